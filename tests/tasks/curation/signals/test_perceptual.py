import io
import random

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, __version__
from skimage.data import astronaut, brick, chelsea, coffee, rocket

from storage.warehouse import Warehouse
from tasks.curation.decode import EncodedImage
from tasks.curation.scene import draw_scene, render
from tasks.curation.signals.perceptual import Decoding, PerceptualHash, phash
from tasks.curation.signals.thumbnail import thumbnail, thumbnail_of_grey
from tests.tasks.curation.images import encoded, kinds_of_files, measured, oriented, photograph, pixels_of

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


@needs_pillow_13
@settings(max_examples=60, deadline=None)
@given(width=st.integers(33, 300), height=st.integers(33, 300), short=st.tuples(*[st.sampled_from(range(8))] * 2))
def test_thumbnails_of_part_of_an_image_are_pillows_own(width: int, height: int, short: tuple[int, int]) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (height, width), np.uint8)
    extent = height - short[0] / 8, width - short[1] / 8
    expected = Image.fromarray(grey).resize((32, 32), Image.Resampling.LANCZOS, box=(0, 0, *extent[::-1]))
    assert np.array_equal(thumbnail_of_grey(grey, 32, extent=extent), np.asarray(expected))


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


# -- decoded at reduced size ----------------------------------------------------------------------------------


def codes(files: list[bytes], decoding: Decoding) -> np.ndarray:
    """The hashes of files, without a warehouse."""
    signal = PerceptualHash(decoding)
    views = [signal.view(pixels_of(data)) for data in files]
    return phash(np.stack(views))


def bits_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.bitwise_count(one ^ other)


def pictures() -> list[Image.Image]:
    """Photographs, scenes as the sample draws them and noise, of many sizes that no power of two divides."""
    choose = random.Random(0)
    sizes = [(choose.randint(200, 800), choose.randint(200, 600)) for _ in range(24)]
    scenes = [render(draw_scene(choose), size=size, seed=at) for at, size in enumerate(sizes[:12])]
    noise = [photograph(*size, seed) for seed, size in enumerate(sizes[12:])]
    photographs = [Image.fromarray(one).convert("RGB") for one in (astronaut(), brick(), chelsea(), coffee(), rocket())]
    return photographs + scenes + noise


@pytest.fixture(scope="module")
def files() -> dict[int, list[bytes]]:
    """The pictures as JPEGs by quality, in both common kinds of chroma subsampling."""
    return {
        quality: [
            encoded(picture, "JPEG", quality=quality, subsampling=at % 2 * 2) for at, picture in enumerate(pictures())
        ]
        for quality in (50, 75, 95)
    }


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_a_reduced_decode_moves_no_hash_by_more_than_four_bits_and_most_by_none(
    files: dict[int, list[bytes]], quality: int
) -> None:
    drift = bits_apart(codes(files[quality], "full"), codes(files[quality], "scaled"))
    assert drift.max() <= 4
    assert drift.mean() < 0.5
    assert (drift == 0).mean() > 0.5


def test_the_edges_that_libjpeg_rounds_up_to_are_taken_into_account(files: dict[int, list[bytes]]) -> None:
    ignoring = [EncodedImage(data).decode_reduced(96) for data in files[75]]
    careless = phash(np.stack([thumbnail_of_grey(one.luma, 32, extent=one.luma.shape) for one in ignoring if one]))
    kept = np.array([one is not None for one in ignoring])
    full, scaled = (codes(files[75], decoding)[kept] for decoding in ("full", "scaled"))
    assert bits_apart(full, scaled).sum() < bits_apart(full, careless).sum() / 2


def test_copies_are_found_as_well_as_with_full_decodes(files: dict[int, list[bytes]]) -> None:
    originals = pictures()
    copies = {
        "re-encoded": files[50],
        "smaller": [encoded(one.resize((one.width * 2 // 3, one.height * 2 // 3)), "JPEG") for one in originals],
        "webp": [encoded(one, "WEBP", quality=70) for one in originals],
    }
    for name, made in copies.items():
        assert bits_apart(codes(files[95], "scaled"), codes(made, "scaled")).max() <= 4, name


def test_different_pictures_stay_far_apart(files: dict[int, list[bytes]]) -> None:
    found = codes(files[75], "scaled")
    apart = bits_apart(found[:, None], found[None])[~np.eye(len(found), dtype=bool)]
    assert apart.min() > 10


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_image_is_hashed_upright(orientation: int) -> None:
    data = oriented(photograph(400, 301), "JPEG", orientation)
    assert bits_apart(codes([data], "full"), codes([data], "scaled")).max() <= 4


def test_all_but_large_jpegs_hash_as_in_full() -> None:
    small = encoded(photograph(500, 191), "JPEG")  # more than half of its size is needed
    some = [*FILES.values(), small, encoded(photograph(500, 300), "PNG")]
    assert codes(some, "scaled").tolist() == codes(some, "full").tolist()


def test_how_far_images_are_decoded_is_part_of_the_fingerprint() -> None:
    assert PerceptualHash("scaled").ref != PerceptualHash("full").ref == PerceptualHash().ref
