"""Semantic pairs and the clusters they are looked for in, over pools written by hand."""

from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from storage.catalog import connect
from storage.record import read_record
from storage.refs import SignalRef
from storage.warehouse import Warehouse
from tasks.curation.pairs import kmeans
from tasks.curation.pairs.clusters import cluster_embeddings
from tasks.curation.pairs.compact import expand_pairs, read_pairs
from tasks.curation.pairs.members import PairsError
from tasks.curation.pairs.semantic import find_semantic_pairs
from tests.tasks.curation.pairs.written import CLIP, PERCEPTUAL, clip_shard, perceptual_shard, pool, rows


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def plane(**degrees):
    """Samples at angles in the plane; None has no embedding."""
    return {s: None if d is None else [np.cos(np.radians(d)), np.sin(np.radians(d))] for s, d in degrees.items()}


def find(warehouse, *shards, **options):
    clusters = cluster_embeddings(pool(*shards), CLIP, warehouse=warehouse).ref
    return find_semantic_pairs(pool(*shards), CLIP, clusters, warehouse=warehouse, **options)


def near(table):
    return [(left, right, round(distance, 2)) for left, right, distance in rows(table)]


def test_near_embeddings_are_pairs_at_one_minus_cosine(warehouse):
    shard = clip_shard(warehouse, "s", plane(a=0, b=20, c=40, d=90, e=None), size=2)
    pairs = find(warehouse, shard).ref
    assert near(read_pairs(pairs, warehouse)) == [("a", "b", 0.06), ("b", "c", 0.06)]
    farther = find(warehouse, shard, max_distance=0.3).ref
    assert near(read_pairs(farther, warehouse)) == [("a", "b", 0.06), ("a", "c", 0.23), ("b", "c", 0.06)]
    assert (pairs.kind, pairs.fingerprint != farther.fingerprint) == ("semantic", True)


def test_equal_embeddings_are_a_star_at_distance_0_and_near_groups_one_row(warehouse):
    shard = clip_shard(warehouse, "s", plane(c=0, a=0, b=0, y=20, x=20), size=2)
    table = read_pairs(find(warehouse, shard).ref, warehouse)
    assert near(table) == [("a", "b", 0.0), ("a", "c", 0.0), ("a", "x", 0.06), ("x", "y", 0.0)]
    assert expand_pairs(table).num_rows == 10


def test_embeddings_without_a_direction_are_in_no_pair(warehouse):
    vectors = {"a": [0, 0], "b": [0, 0], "c": [np.inf, 1], "d": [np.nan, 1], "e": None, "f": [1, 0], "g": [2, 0]}
    assert near(read_pairs(find(warehouse, clip_shard(warehouse, "s", vectors, size=2)).ref, warehouse)) == [
        ("f", "g", 0.0)
    ]


@pytest.mark.parametrize("shards", [[{"a": None}], [{"a": [1, 0]}, {}]])
def test_pools_with_nothing_to_compare_have_no_pairs(warehouse, shards):
    written = [clip_shard(warehouse, f"s{at}", vectors, size=2) for at, vectors in enumerate(shards)]
    assert read_pairs(find(warehouse, *written).ref, warehouse).num_rows == 0


def test_a_grown_pool_compares_only_what_is_new_and_finds_what_a_search_of_all_finds(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.curation.pairs.clusters.FEW", 100)
    rng = np.random.default_rng(0)
    points = rng.normal(size=(60, 1, 16)) + 0.2 * rng.normal(size=(60, 10, 16))
    vectors = dict(zip([f"{i:04}" for i in rng.permutation(600)], points.reshape(-1, 16), strict=True))
    names = list(vectors)
    one, two = Warehouse(str(tmp_path / "one")), Warehouse(str(tmp_path / "two"))
    parts = [{name: vectors[name] for name in names[begin::3]} for begin in range(3)]
    at_once = find(one, *(clip_shard(one, f"s{at}", part, size=16) for at, part in enumerate(parts))).ref
    shards = []
    for at, part in enumerate(parts):
        shards.append(clip_shard(two, f"s{at}", part, size=16))
        step = find(two, *shards)
        assert not step.cached
    assert find(two, *shards).cached
    assert len(step.ref.paths) == 3
    counts = sorted(tuple(read_record(two, p.replace("parquet", "json")).counts.values())[:2] for p in step.ref.paths)
    assert counts == [(200, 0), (200, 200), (200, 400)]
    expected = set(rows(expand_pairs(read_pairs(at_once, one))))
    found = set(rows(expand_pairs(read_pairs(step.ref, two))))
    assert len(expected) > 500
    assert len(expected & found) > 0.97 * len(expected)  # centroids differ, so a few pairs across borders do too


def test_the_clusters_are_columns_a_policy_and_the_catalog_can_use(warehouse):
    shard = clip_shard(warehouse, "s", plane(a=0, b=40, c=None), size=2)
    ref = cluster_embeddings(pool(shard), CLIP, warehouse=warehouse).ref
    table = warehouse.read_table(ref.table(shard)).to_pylist()
    assert [(row["sample_id"], row["semantic_cluster"], row["other_clusters"]) for row in table] == [
        ("a", 0, []),
        ("b", 0, []),
        ("c", None, None),
    ]
    np.testing.assert_allclose([row["centroid_distance"] for row in table[:2]], 1 - np.cos(np.radians(20)), atol=1e-3)
    with connect(warehouse) as catalog:
        warehouse.write_table(shard.path, pa.table({"sample_id": ["a", "b", "c"]}))
    with connect(warehouse) as catalog:
        assert catalog.sql("select count(centroid_distance) from signals").fetchall() == [(2,)]


def test_centroids_are_kept_until_the_pool_is_several_times_larger(warehouse):
    def shard(name, count):
        return clip_shard(warehouse, name, {f"{name}{i}": [1, i] for i in range(count)}, size=2)

    first = shard("a", 10)
    small = cluster_embeddings(pool(first), CLIP, warehouse=warehouse)
    assert not small.cached
    assert cluster_embeddings(pool(first), CLIP, warehouse=warehouse).cached
    grown = cluster_embeddings(pool(first, shard("b", 30)), CLIP, warehouse=warehouse)
    assert (grown.ref, grown.cached) == (small.ref, False)
    large = cluster_embeddings(pool(first, shard("b", 30), shard("c", 1)), CLIP, warehouse=warehouse)
    assert large.ref != small.ref
    assert cluster_embeddings(pool(first), CLIP, warehouse=warehouse).ref == small.ref


def test_near_embeddings_lie_in_each_others_clusters():
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(3000, 64)).astype(np.float16)
    copies = (vectors + 0.2 * rng.normal(size=vectors.shape)).astype(np.float16)
    centroids = kmeans.train(vectors, 30)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    one, other = kmeans.find_nearest(vectors, centroids), kmeans.find_nearest(copies, centroids)
    exact = vectors.astype(np.float64) @ centroids.T
    assert (one.own == exact.argmax(axis=1)).mean() > 0.999
    alone = one.own == other.own
    probed = alone | (one.others == other.own[:, None]).any(axis=1) | (other.others == one.own[:, None]).any(axis=1)
    assert alone.mean() < 0.95 < 0.99 < probed.mean()


def test_centroids_are_as_near_to_the_samples_as_faiss_finds_them():
    rng = np.random.default_rng(4)
    vectors = (rng.normal(size=(50, 32))[rng.integers(0, 50, 8000)] + rng.normal(size=(8000, 32))).astype(np.float16)
    theirs = faiss.Kmeans(32, 60, niter=20, spherical=True, seed=1)
    unit = vectors.astype(np.float32) / np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    theirs.train(unit)
    fit = (unit @ theirs.centroids.T).max(axis=1).mean()
    ours = kmeans.train(vectors, 60)
    assert (unit @ ours.T).max(axis=1).mean() > 0.99 * fit
    assert len(np.unique(kmeans.find_nearest(vectors, ours).own)) == 60
    np.testing.assert_array_equal(ours, kmeans.train(vectors, 60))


def test_a_pool_that_was_not_scored_or_clustered_is_named(warehouse):
    shard = clip_shard(warehouse, "s", plane(a=0), size=2)
    other = clip_shard(warehouse, "t", plane(b=0), size=2)
    clusters = cluster_embeddings(pool(shard), CLIP, warehouse=warehouse).ref
    with pytest.raises(PairsError, match=r"clusters@.*/t.parquet is not there.* Call cluster_embeddings"):
        find_semantic_pairs(pool(shard, other), CLIP, clusters, warehouse=warehouse)
    with pytest.raises(PairsError, match=r"Score pools/pool/s.parquet with the signal clip first"):
        cluster_embeddings(pool(shard), SignalRef("clip", "other"), warehouse=warehouse)
    hashed = perceptual_shard(warehouse, "s", {"a": 1})
    with pytest.raises(PairsError, match=r"no column 'image_embedding' .* Columns: sample_id, phash, flat"):
        cluster_embeddings(pool(hashed), PERCEPTUAL, warehouse=warehouse)
    with pytest.raises(PairsError, match="pool pool has no samples to cluster"):
        cluster_embeddings(pool(), CLIP, warehouse=warehouse)
