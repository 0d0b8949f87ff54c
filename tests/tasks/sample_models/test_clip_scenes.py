import random

import numpy as np
import pytest

from tasks.curation.scene import Scene, draw_scene
from tasks.sample_models import clip_scenes
from tasks.sample_models.clip_scenes import PHRASINGS, SIDE, draw_chunk, draw_similar


def differences(one: Scene, other: Scene) -> int:
    """Things that differ: the background, and of each group the count, colour, shape, size and position."""
    fields = ("count", "colour", "shape", "size", "position")
    groups = zip(one.groups, other.groups, strict=True)
    return (one.background != other.background) + sum(
        getattr(a, field) != getattr(b, field) for a, b in groups for field in fields
    )


def test_similar_scenes_differ_in_one_thing_or_none() -> None:
    rng = random.Random(0)
    found = [differences(scene, draw_similar(scene, rng)) for scene in (draw_scene(rng) for _ in range(200))]
    assert set(found) == {0, 1}
    assert 0.15 < found.count(0) / 200 < 0.35


def test_a_chunk_holds_pictures_copies_strangers_and_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_scenes, "CHUNK", 6)
    views, captions = draw_chunk("a seed")
    assert (views.shape, views.dtype) == ((6, 3, 3, SIDE, SIDE), np.uint8)
    assert len(captions) == 6 * PHRASINGS
    again, same_captions = draw_chunk("a seed")
    assert np.array_equal(views, again)
    assert captions == same_captions
    assert len({views[row, view].tobytes() for row in range(6) for view in range(3)}) == 18
