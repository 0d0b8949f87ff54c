import io

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, __version__

from storage.warehouse import Warehouse
from tasks.curation.signals.perceptual import PerceptualHash, phash
from tasks.curation.signals.thumbnail import thumbnail
from tests.tasks.curation.images import encoded, kinds_of_files, measured, photograph

needs_pillow_13 = pytest.mark.skipif(
    int(__version__.split(".")[0]) < 13, reason="before Pillow 13 tall images were reduced in the other order"
)
FILES = kinds_of_files()


def oracle(image: Image.Image) -> int:
    return int(str(imagehash.phash(image)), 16)


def hashes(warehouse: Warehouse, *images: bytes) -> list[int]:
    return [row["phash"] for row in measured(PerceptualHash(), warehouse, images)]


def test_every_kind_of_file_hashes_as_in_imagehash(warehouse: Warehouse) -> None:
    files = {kind: data for kind, data in FILES.items() if kind != "png_16_bit"}
    images = [ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA") for data in files.values()]
    assert hashes(warehouse, *files.values()) == [oracle(image) for image in images]


@needs_pillow_13
@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 99), contrast=st.sampled_from([1, 255])
)
def test_thumbnails_of_any_shape_are_pillows_own(width: int, height: int, seed: int, contrast: int) -> None:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    pixels = levels if contrast == 1 else (levels > 127).astype(np.uint8) * 255
    expected = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(thumbnail(pixels, 32), np.asarray(expected))


@needs_pillow_13
@pytest.mark.parametrize(
    "shape", [(32, 32), (32, 500), (500, 32), (1, 1), (3000, 2), (2, 3000), (480, 640), (1201, 77)]
)
def test_thumbnails_of_awkward_shapes_are_pillows_own(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    expected = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    assert np.array_equal(thumbnail(pixels, 32), np.asarray(expected))


def test_grey_is_pillows_own_for_every_colour() -> None:
    code = np.arange(2**24, dtype=np.uint32)
    colours = np.stack([code & 255, code >> 8 & 255, code >> 16], axis=-1).astype(np.uint8)
    for part in colours.reshape(2**14, 32, 32, 3)[:: 2**6]:
        assert np.array_equal(thumbnail(part, 32), np.asarray(Image.fromarray(part).convert("L")))


def test_symmetric_images_whose_frequencies_tie_hash_as_in_imagehash() -> None:
    rng = np.random.default_rng(0)
    quarters = rng.integers(0, 256, (20, 32, 32), np.uint8)
    images = [np.maximum(q, q[:, ::-1]) for q in quarters] + [np.maximum(q, q[::-1]) for q in quarters]
    images += [np.full((32, 32), level, np.uint8) for level in (0, 128, 255)]
    assert phash(np.stack(images)).tolist() == [oracle(Image.fromarray(image)) for image in images]


def test_re_encoding_and_resizing_move_the_hash_by_at_most_four_bits(warehouse: Warehouse) -> None:
    images = [photograph(320, 240, seed) for seed in range(20)]
    original = np.array(hashes(warehouse, *(encoded(image, "PNG") for image in images)), np.uint64)
    for copies in (
        [encoded(image, "JPEG", quality=50) for image in images],
        [encoded(image.resize((200, 150), Image.Resampling.BICUBIC), "JPEG") for image in images],
        [encoded(image, "WEBP", quality=70) for image in images],
    ):
        copied = np.array(hashes(Warehouse(f"{warehouse.root}-{len(copies[0])}"), *copies), np.uint64)
        assert np.bitwise_count(original ^ copied).max() <= 4


def test_flat_images_are_marked(warehouse: Warehouse) -> None:
    faint = Image.fromarray((np.asarray(photograph()) // 100 + 100).astype(np.uint8))
    images = [Image.new("RGB", (50, 50), "white"), faint, photograph()]
    rows = measured(PerceptualHash(), warehouse, [encoded(image, "PNG") for image in images])
    assert [row["flat"] for row in rows] == [True, True, False]


def test_an_undecodable_image_has_no_hash(warehouse: Warehouse) -> None:
    rows = measured(PerceptualHash(), warehouse, [b"no image", FILES["png"]])
    assert rows[0] == {"phash": None, "flat": None}
    assert rows[1]["phash"] == oracle(photograph())
