"""Perceptual pairs of pools written by hand."""

from itertools import combinations
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.record import read_record
from storage.refs import SignalRef
from storage.schema import PAIRS
from storage.warehouse import Warehouse
from tasks.curation.pairs.compact import expand_pairs, read_pairs
from tasks.curation.pairs.hamming import TooManyPairsError
from tasks.curation.pairs.members import PairsError
from tasks.curation.pairs.perceptual import find_perceptual_pairs
from tests.tasks.curation.pairs.written import EXACT, PERCEPTUAL, exact_shard, perceptual_shard, pool, rows


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def find(warehouse, *shards, **options):
    return find_perceptual_pairs(pool(*shards), PERCEPTUAL, warehouse=warehouse, **options)


def record_of(warehouse, path):
    return read_record(warehouse, path.replace(".parquet", ".json"))


def test_near_hashes_are_pairs_up_to_the_distance_asked_for(warehouse):
    shard = perceptual_shard(warehouse, "s", {"a": 0, "b": 0b1111, "c": 0b11111, "d": 2**64 - 1})
    pairs = find(warehouse, shard).ref
    assert rows(read_pairs(pairs, warehouse)) == [("a", "b", 4.0), ("b", "c", 1.0)]
    assert pairs.kind == "perceptual"
    nearer = find(warehouse, shard, max_distance=1).ref
    assert rows(read_pairs(nearer, warehouse)) == [("b", "c", 1.0)]
    assert nearer.fingerprint != pairs.fingerprint


def test_the_smaller_id_is_on_the_left_whatever_the_order_of_samples_and_hashes(warehouse):
    pairs = find(warehouse, perceptual_shard(warehouse, "s", {"b": 1, "c": 8, "a": 3})).ref
    assert rows(read_pairs(pairs, warehouse)) == [("a", "b", 1.0), ("a", "c", 3.0), ("b", "c", 2.0)]


def test_equal_hashes_are_a_star_around_the_smallest_id_and_near_groups_one_row(warehouse):
    shard = perceptual_shard(warehouse, "s", {"b": 0, "y": 1, "c": 0, "a": 0, "x": 1, "z": 2**40 - 1})
    pairs = find(warehouse, shard).ref
    assert rows(warehouse.read_table(pairs.paths[0])) == [
        ("a", "b", 0.0),
        ("a", "c", 0.0),
        ("a", "x", 1.0),
        ("x", "y", 0.0),
    ]
    assert rows(expand_pairs(read_pairs(pairs, warehouse))) == [
        ("a", "b", 0.0),
        ("a", "c", 0.0),
        ("a", "x", 1.0),
        ("a", "y", 1.0),
        ("b", "c", 0.0),
        ("b", "x", 1.0),
        ("b", "y", 1.0),
        ("c", "x", 1.0),
        ("c", "y", 1.0),
        ("x", "y", 0.0),
    ]


def test_samples_without_a_hash_and_flat_ones_are_in_no_pair(warehouse):
    shard = perceptual_shard(warehouse, "s", {"a": 0, "b": None, "c": None, "d": 0, "e": 0}, flat=["d"])
    assert rows(read_pairs(find(warehouse, shard).ref, warehouse)) == [("a", "e", 0.0)]


@pytest.mark.parametrize("shards", [[], [{}], [{"a": None}], [{"a": 1}, {}]])
def test_pools_with_nothing_to_compare_have_no_pairs(warehouse, shards):
    written = [perceptual_shard(warehouse, f"s{at}", codes) for at, codes in enumerate(shards)]
    table = read_pairs(find(warehouse, *written).ref, warehouse)
    assert table.num_rows == 0
    assert table.schema.equals(PAIRS, check_metadata=True)
    assert expand_pairs(table).num_rows == 0


def test_the_same_pool_again_is_cached(warehouse):
    shards = [perceptual_shard(warehouse, "s", {"a": 0, "b": 1}), perceptual_shard(warehouse, "t", {"c": 3})]
    first = find(warehouse, *shards)
    again = find(warehouse, *reversed(shards))
    assert (first.cached, again.cached) == (False, True)
    assert again.ref == first.ref
    larger = [*shards, *(perceptual_shard(warehouse, f"u{at}", {f"u{at}": at}) for at in range(5))]
    grown, again = find(warehouse, *larger), find(warehouse, *larger)
    assert (grown.cached, again.cached) == (False, True)
    assert again.ref == grown.ref


def test_a_grown_pool_compares_new_shards_with_all_and_links_them_to_what_was_there(warehouse):
    old = {"b": 0, "c": 0, "d": 0xFF00, "e": 0xFF00, "y": 2**50 - 1, "z": 2**50 - 1}
    shards = [perceptual_shard(warehouse, "old", old), perceptual_shard(warehouse, "new", {"a": 0, "f": 0x7F00})]
    first = find(warehouse, shards[0]).ref
    grown = find(warehouse, *shards).ref
    (path,) = set(grown.paths) - set(first.paths)
    assert set(first.paths) < set(grown.paths)
    added = record_of(warehouse, path)
    assert added.inputs == {"new": ["new"], "old": ["old"]}
    assert added.counts == {"new": 2, "old": 6, "rows": 4}
    # complete by itself: `d` and `e` are old, but both near the new `f`; nothing new is near `y` and `z`
    expected = [("a", "b", 0.0), ("a", "c", 0.0), ("d", "e", 0.0), ("d", "f", 1.0)]
    assert rows(warehouse.read_table(path)) == expected
    assert rows(read_pairs(grown, warehouse)) == [*expected, ("y", "z", 0.0)]


def test_pairs_can_be_read_for_some_samples_only(warehouse):
    shard = perceptual_shard(warehouse, "s", {"a": 0, "b": 0, "c": 0, "d": 1, "e": 1, "f": 2})
    pairs = find(warehouse, shard).ref
    some = read_pairs(pairs, warehouse, ids=pa.array(["b", "c", "e", "unknown"]))
    assert rows(some) == [("b", "c", 0.0), ("b", "e", 1.0)]
    assert rows(read_pairs(pairs, warehouse, ids=pa.chunked_array([["f"], ["e"]]))) == [("e", "f", 2.0)]


def test_shards_that_left_the_pool_leave_no_pairs_behind(warehouse):
    gone = perceptual_shard(warehouse, "gone", {"a": 0, "x": 3})
    here, there = (perceptual_shard(warehouse, name, {f"{name}": 0, f"{name}2": 7}) for name in ("m", "n"))
    find(warehouse, gone, here, there)
    left = find(warehouse, here, there)
    assert left.cached
    ids = pa.array(["m", "m2", "n", "n2"])
    assert rows(read_pairs(left.ref, warehouse, ids=ids)) == [
        ("m", "m2", 3.0),
        ("m", "n", 0.0),
        ("m2", "n2", 0.0),
    ]


def test_a_table_that_was_deleted_is_made_again(warehouse):
    shard = perceptual_shard(warehouse, "s", {"a": 0, "b": 1})
    first = find(warehouse, shard).ref
    before = warehouse.read_bytes(first.paths[0])
    warehouse.local_path(first.paths[0]).unlink()
    again = find(warehouse, shard)
    assert not again.cached
    assert again.ref == first
    assert warehouse.read_bytes(first.paths[0]) == before


def test_a_table_without_its_record_does_not_count(warehouse):
    shard = perceptual_shard(warehouse, "s", {"a": 0, "b": 1})
    path = find(warehouse, shard).ref.paths[0]
    warehouse.local_path(path.replace(".parquet", ".json")).unlink()
    assert not find(warehouse, shard).cached
    assert find(warehouse, shard).cached


def test_the_same_shards_give_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**10, 3000, np.uint64).tolist()
    written = []
    for copy in ("one", "two"):
        warehouse = Warehouse(str(tmp_path / copy))
        shards = [
            perceptual_shard(warehouse, f"s{at}", {f"{i:032x}": codes[i] for i in range(at, 3000, 3)})
            for at in ((0, 1, 2) if copy == "one" else (2, 0, 1))
        ]
        pairs = find_perceptual_pairs(pool(*shards), PERCEPTUAL, warehouse=warehouse).ref
        written.append((pairs, [warehouse.read_bytes(path) for path in pairs.paths]))
    assert written[0] == written[1]


def test_three_hundred_thousand_equal_images_take_as_many_rows(warehouse):
    count = 300_000
    shard = perceptual_shard(warehouse, "s", {f"{i:032x}": 5 for i in range(count)})
    late = perceptual_shard(warehouse, "t", {"f" * 32: 5, "e" * 32: 7})
    assert read_pairs(find(warehouse, shard).ref, warehouse).num_rows == count - 1
    grown = read_pairs(find(warehouse, shard, late).ref, warehouse)
    assert grown.num_rows == count + 1
    with pytest.raises(TooManyPairsError, match="45,000,450,001 pairs follow"):
        expand_pairs(grown)


def start_together(barrier):
    find_in_process.barrier = barrier


def find_in_process(root, asked):
    warehouse = Warehouse(root)
    codes = {name: {f"{name}{i:03}": i % 50 for i in range(100)} for name in "abc"}
    written = {name: perceptual_shard(warehouse, name, codes[name]) for name in codes}
    refs = []
    for names in asked:
        find_in_process.barrier.wait(60)
        refs.append(find(warehouse, *(written[name] for name in names)).ref)
    return refs


def test_processes_at_once_each_get_all_pairs(warehouse):
    asked = [("ab", "abc"), ("ab", "bc")]
    context = get_context("spawn")
    with context.Pool(2, start_together, (context.Barrier(2),)) as processes:
        found = processes.starmap(find_in_process, [(warehouse.root, names) for names in asked], chunksize=1)
    for pools, refs in zip(asked, found, strict=True):
        for names, ref in zip(pools, refs, strict=True):
            codes = {f"{name}{i:03}": i % 50 for name in names for i in range(100)}
            expected = [
                (one, other, (codes[one] ^ codes[other]).bit_count())
                for one, other in combinations(sorted(codes), 2)
                if (codes[one] ^ codes[other]).bit_count() <= 4
            ]
            assert rows(expand_pairs(read_pairs(ref, warehouse, ids=pa.array(codes)))) == expected


def test_a_shard_that_was_not_scored_is_named(warehouse):
    scored = perceptual_shard(warehouse, "s", {"a": 0})
    unscored = type(scored)("pool", "t", 3)
    with pytest.raises(
        PairsError, match=r"signals/perceptual@p1/t\.parquet is not there.* Score pools/pool/t\.parquet"
    ):
        find(warehouse, scored, unscored)


def test_a_signal_that_measures_something_else_is_refused(warehouse):
    shard = exact_shard(warehouse, "s", {"a": ("1", "2")})
    with pytest.raises(PairsError, match=r"exact@e1 has no column 'phash'.*sample_id, bytes_hash, pixels_hash"):
        find_perceptual_pairs(pool(shard), EXACT, warehouse=warehouse)


def test_another_version_of_the_signal_is_other_evidence(warehouse):
    other = SignalRef("perceptual", "p2")
    shard = perceptual_shard(warehouse, "s", {"a": 0, "b": 0})
    table = pa.table({"sample_id": ["a", "b"], "phash": pa.array([0, 2**64 - 1], pa.uint64()), "flat": [False, False]})
    warehouse.write_table(other.table(shard), table)
    assert find(warehouse, shard).ref != find_perceptual_pairs(pool(shard), other, warehouse=warehouse).ref
    assert read_pairs(find_perceptual_pairs(pool(shard), other, warehouse=warehouse).ref, warehouse).num_rows == 0
