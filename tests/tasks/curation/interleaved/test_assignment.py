"""Assignment against all permutations, and against MMC4's own procedure written out."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.curation.interleaved.assignment import assign


def best_by_trying_all(similarity: np.ndarray) -> float:
    """The largest sum that any one-to-one assignment reaches."""
    images, texts = similarity.shape
    if images > texts:
        return best_by_trying_all(similarity.T)
    return max(
        sum(similarity[at, text] for at, text in enumerate(chosen)) for chosen in permutations(range(texts), images)
    )


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_sum_is_the_largest_that_any_one_to_one_assignment_has(images: int, texts: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).normal(0.2, 0.1, (images, texts)).astype(np.float32)
    assigned = assign(similarity)
    first: dict[int, float] = {}
    leftovers = []
    for image, text in enumerate(assigned.tolist()):
        assert 0 <= text < texts
        if text in first:
            leftovers.append(image)
        first[text] = max(first.get(text, -9.0), float(similarity[image, text]))
    if images <= texts:
        assert not leftovers
        total = float(similarity[np.arange(images), assigned].sum())
        assert total == pytest.approx(best_by_trying_all(similarity), abs=1e-5)
    else:
        assert len(first) == texts


def mmc4(similarity: np.ndarray) -> list[int]:
    """MMC4's steps: negate, pad to a square with 1000, solve one to one, leftovers to their most similar sentence."""
    images, texts = similarity.shape
    side = max(images, texts)
    cost = np.full((side, side), 1000.0)
    cost[:images, :texts] = -similarity
    best = min(permutations(range(side)), key=lambda chosen: sum(cost[at, to] for at, to in enumerate(chosen)))
    return [to if to < texts else int(np.argmax(similarity[at])) for at, to in enumerate(best[:images])]


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (2, 5), (5, 2), (6, 3), (4, 1), (1, 6)])
def test_assignments_are_mmc4s(shape: tuple[int, int]) -> None:
    for seed in range(12):
        similarity = np.random.default_rng(seed).uniform(0, 0.4, shape)
        assert assign(similarity).tolist() == mmc4(similarity)


def test_the_example_of_mmc4s_own_page() -> None:
    similarity = np.array([[0.24363446, 0.31758785, 0.27694184], [0.22331068, 0.32349196, 0.26118797]])
    assert assign(similarity).tolist() == [2, 1]


def test_a_leftover_image_goes_to_its_most_similar_text_and_the_first_of_equals() -> None:
    assert assign(np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])).tolist() == [0, 1, 0]


def test_without_texts_nothing_is_assigned() -> None:
    assert assign(np.zeros((3, 0))).tolist() == [-1, -1, -1]
    assert assign(np.zeros((0, 3))).tolist() == []
