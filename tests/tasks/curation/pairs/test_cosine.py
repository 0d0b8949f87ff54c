"""Near embeddings against numpy comparing every two."""

import time

import numpy as np
import pytest
import torch

from tasks.curation.pairs import cosine
from tasks.curation.pairs.cosine import Clustered, cosine_pairs
from tasks.curation.pairs.kmeans import find_nearest, train


def clustered(vectors, clusters=None, *, old=0):
    """Embeddings in clusters given by hand, else all in one."""
    own = np.zeros(len(vectors), np.int32) if clusters is None else np.asarray(clusters, np.int32)
    none = np.full((len(vectors), 0), -1, np.int32)
    return Clustered(np.asarray(vectors, np.float16), np.arange(len(vectors)), own, none, old)


def directions(degrees):
    """Vectors in the plane: the cosine of two is that of the angle between them."""
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=1)


def every_pair(vectors, max_distance, old=0):
    """The oracle, in float64."""
    exact = np.asarray(vectors, np.float16).astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    distance = 1 - exact @ exact.T
    left, right = np.nonzero(np.triu(distance <= max_distance, 1))
    return [(i, j) for i, j in zip(left, right, strict=True) if j >= old], distance


def around(rng, centres, each, spread, size=32):
    """`each` embeddings around each of some random centres."""
    points = rng.normal(size=(centres, 1, size)) + spread * rng.normal(size=(centres, each, size))
    return rng.permutation(points.reshape(-1, size)).astype(np.float16)


def test_pairs_are_those_within_the_distance_which_is_one_minus_cosine():
    found = cosine_pairs(clustered(directions([0, 10, 30, 180])), max_distance=0.1)
    assert list(zip(found.left, found.right, strict=True)) == [(0, 1), (1, 2)]
    np.testing.assert_allclose(found.distance, 1 - np.cos(np.radians([10, 20])), atol=1e-3)
    assert found.distance.dtype == np.float32


@pytest.mark.parametrize("old", [0, 1, 150, 299, 300])
@pytest.mark.parametrize(("block", "tile"), [(1024, 8192), (7, 13)])
def test_in_one_cluster_every_pair_with_a_new_end_is_found_and_no_other(monkeypatch, old, block, tile):
    monkeypatch.setattr(cosine, "BLOCK", block)
    monkeypatch.setattr(cosine, "TILE", tile)
    vectors = around(np.random.default_rng(0), 40, 8, 0.2)[:300]
    found = cosine_pairs(clustered(vectors, old=old), max_distance=0.1)
    expected, distance = every_pair(vectors, 0.1, old)
    assert list(zip(found.left.tolist(), found.right.tolist(), strict=True)) == expected
    np.testing.assert_allclose(found.distance, distance[found.left, found.right], atol=1e-6)
    assert len(expected) > 100 or old > 150


def test_pairs_of_other_clusters_are_found_if_one_end_is_nearly_as_near_to_the_others_cluster():
    vectors = directions([0, 5, 10, 15])
    own, others = np.array([0, 0, 1, 1], np.int32), np.array([[-1], [1], [-1], [-1]], np.int32)
    found = cosine_pairs(Clustered(np.float16(vectors), np.arange(4), own, others, 0), max_distance=0.1)
    assert list(zip(found.left, found.right, strict=True)) == [(0, 1), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("old", [0, 500, 990])
def test_across_clusters_each_pair_is_found_once_and_new_ones_find_all_that_a_search_of_all_finds(old):
    vectors = around(np.random.default_rng(1), 100, 10, 0.25)
    near = find_nearest(vectors, train(vectors, 12))
    whole = cosine_pairs(Clustered(vectors, np.arange(1000), near.own, near.others, 0), max_distance=0.1)
    added = cosine_pairs(Clustered(vectors, np.arange(1000), near.own, near.others, old), max_distance=0.1)
    pairs = list(zip(whole.left.tolist(), whole.right.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert list(zip(added.left.tolist(), added.right.tolist(), strict=True)) == [p for p in pairs if p[1] >= old]
    expected, _ = every_pair(vectors, 0.1)
    assert set(pairs) <= set(expected)
    assert len(pairs) > 0.98 * len(expected)
    within = [p for p in expected if near.own[p[0]] == near.own[p[1]]]
    assert len(within) < len(pairs)


def test_embeddings_that_differ_are_never_at_distance_0():
    vectors = np.ones((2, 64), np.float16)
    vectors[1, 0] = np.nextafter(np.float16(1), np.float16(2))
    found = cosine_pairs(clustered(vectors), max_distance=0.1)
    assert 0 < found.distance[0] < 1e-6


def test_of_more_near_ones_than_an_embedding_can_keep_it_keeps_the_nearest(monkeypatch):
    monkeypatch.setattr(cosine, "NEIGHBOURS", 2)
    monkeypatch.setattr(cosine, "BLOCK", 1)
    monkeypatch.setattr(cosine, "TILE", 2)
    found = cosine_pairs(clustered(directions([0, 14, 28, 42, 21.5])), max_distance=0.5)
    kept = {later: [i for i, j in zip(found.left, found.right, strict=True) if j == later] for later in (3, 4)}
    assert kept == {3: [1, 2], 4: [1, 2]}


def test_in_a_crowd_what_is_nearly_equal_counts_as_equal_to_an_earlier_one_and_is_compared_no_further(monkeypatch):
    monkeypatch.setattr(cosine, "NEIGHBOURS", 2)
    monkeypatch.setattr(cosine, "BLOCK", 1)
    found = cosine_pairs(clustered(directions([0, 8, 16, 16.5, 16.6])), max_distance=0.5)
    pairs = {(i, j): d for i, j, d in zip(*(part.tolist() for part in found), strict=True)}
    assert set(pairs) == {(0, 1), (0, 2), (1, 2), (2, 3), (2, 4)}
    assert (pairs[2, 3], pairs[2, 4]) == (0, 0)


def test_twenty_thousand_copies_of_one_icon_take_seconds_and_few_pairs():
    rng = np.random.default_rng(2)
    icon = rng.normal(size=128)
    vectors = (icon + 0.04 * rng.normal(size=(20_000, 128))).astype(np.float16)  # distances of about 0.0016
    began = time.perf_counter()
    found = cosine_pairs(clustered(vectors), max_distance=0.1)
    assert time.perf_counter() - began < 20
    assert len(found.left) < 2 * cosine.BLOCK**2
    assert set(found.right.tolist()) == set(range(1, 20_000))


def test_no_embeddings_make_no_pairs():
    found = cosine_pairs(clustered(np.zeros((0, 4))), max_distance=0.1)
    assert [len(part) for part in found] == [0, 0, 0]


@pytest.mark.parametrize("max_distance", [0, 1, 4, -0.1])
def test_distances_that_are_no_small_cosine_distance_are_refused(max_distance):
    with pytest.raises(ValueError, match="Use a number above 0 and below 1"):
        cosine_pairs(clustered(directions([0, 1])), max_distance=max_distance)


def test_half_precision_as_on_a_gpu_gives_the_same_pairs(monkeypatch):
    vectors = around(np.random.default_rng(5), 60, 8, 0.2, size=64)
    exact = cosine_pairs(clustered(vectors), max_distance=0.1)
    monkeypatch.setattr(cosine, "device", lambda: torch.device("cuda"))
    found = cosine_pairs(clustered(vectors), max_distance=0.1)
    np.testing.assert_array_equal(found.left, exact.left)
    np.testing.assert_array_equal(found.right, exact.right)
    np.testing.assert_allclose(found.distance, exact.distance, atol=1e-6)
