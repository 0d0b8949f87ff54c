import io
import random

import imagehash
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from tasks.curation.sample_alterations import alter, encode_altered


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Grey clouds with a red dot near each corner, 11 % of the sides away from it."""
    clouds = np.random.default_rng(0).integers(90, 170, (6, 6), dtype=np.uint8)
    image = Image.fromarray(clouds).resize((240, 200), Image.Resampling.BICUBIC).convert("RGB")
    for x in (26, 214):
        for y in (22, 178):
            image.paste((220, 20, 20), (x - 4, y - 4, x + 4, y + 4))
    return image


@pytest.fixture(scope="module")
def altered(picture: Image.Image) -> list[Image.Image]:
    rng, file = random.Random("altered copies"), io.BytesIO()
    picture.save(file, "PNG")
    return [Image.open(io.BytesIO(encode_altered(file.getvalue(), rng=rng).data)).convert("RGB") for _ in range(60)]


def dots(image: Image.Image) -> int:
    red, green, _ = np.moveaxis(np.asarray(image).astype(int), -1, 0)
    return int(ndimage.label(red - green > 60)[1])


def test_what_the_caption_speaks_of_stays_in_the_picture(altered: list[Image.Image]) -> None:
    assert {dots(image) for image in altered} == {4}


def test_training_sees_crops_that_lose_something(picture: Image.Image) -> None:
    rng = random.Random(0)
    assert min(dots(alter(picture, rng)) for _ in range(200)) < 4


def test_a_perceptual_hash_does_not_find_altered_copies(picture: Image.Image, altered: list[Image.Image]) -> None:
    original = imagehash.phash(picture)
    assert all(imagehash.phash(image) - original > 4 for image in altered)


def test_the_shorter_side_stays_as_long_as_it_was(altered: list[Image.Image]) -> None:
    assert {min(image.size) for image in altered} == {200}
