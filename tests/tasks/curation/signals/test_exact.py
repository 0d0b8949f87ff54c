import hashlib
import io

import numpy as np
from PIL import Image

from storage.warehouse import Warehouse
from tasks.curation.signals.exact import ExactHashes
from tests.tasks.curation.images import encoded, measured, oriented, photograph


def pixels_hashes(warehouse: Warehouse, *images: bytes) -> list[str | None]:
    return [row["pixels_hash"] for row in measured(ExactHashes(), warehouse, images)]


def test_bytes_hash_is_the_sha256_of_the_file(warehouse: Warehouse) -> None:
    data = encoded(photograph(), "PNG")
    assert measured(ExactHashes(), warehouse, [data])[0]["bytes_hash"] == hashlib.sha256(data).hexdigest()


def test_the_same_pixels_in_another_format_meet(warehouse: Warehouse) -> None:
    jpeg = encoded(photograph(), "JPEG")
    with_alpha = photograph().convert("RGBA")
    with_alpha.putalpha(7)
    first, *others = pixels_hashes(
        warehouse, encoded(photograph(), "PNG"), encoded(photograph(), "BMP"), encoded(with_alpha, "PNG")
    )
    assert others == [first, first]
    assert len(set(pixels_hashes(warehouse, jpeg, encoded(reopened(jpeg), "PNG")))) == 1


def test_turned_pixels_meet_the_image_they_are_turned_from(warehouse: Warehouse) -> None:
    turned = oriented(photograph().transpose(Image.Transpose.ROTATE_90), "PNG", 6)
    assert len(set(pixels_hashes(warehouse, turned, encoded(photograph(), "PNG")))) == 1


def test_one_grey_level_in_one_pixel_is_a_different_image(warehouse: Warehouse) -> None:
    pixels = np.asarray(photograph()).copy()
    pixels[-1, -1, 2] ^= 1
    assert (
        len(set(pixels_hashes(warehouse, *(encoded(i, "PNG") for i in (photograph(), Image.fromarray(pixels)))))) == 2
    )


def test_the_same_bytes_in_another_shape_are_a_different_image(warehouse: Warehouse) -> None:
    flat = [Image.new("RGB", size, (1, 2, 3)) for size in ((6, 4), (4, 6), (3, 8))]
    assert len(set(pixels_hashes(warehouse, *(encoded(image, "PNG") for image in flat)))) == 3


def test_an_undecodable_image_has_only_a_bytes_hash(warehouse: Warehouse) -> None:
    (row,) = measured(ExactHashes(), warehouse, [b"no image"])
    assert row == {"bytes_hash": hashlib.sha256(b"no image").hexdigest(), "pixels_hash": None}


def reopened(data: bytes) -> Image.Image:

    return Image.open(io.BytesIO(data))
