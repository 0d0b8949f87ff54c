"""Exact pairs of pools written by hand."""

from pathlib import Path

import pytest

from storage.warehouse import Warehouse
from tasks.curation.pairs.compact import expand_pairs, read_pairs
from tasks.curation.pairs.exact import find_exact_pairs
from tasks.curation.pairs.members import PairsError
from tests.tasks.curation.pairs.written import EXACT, PERCEPTUAL, exact_shard, perceptual_shard, pool, rows

DARK, LIGHT, RED = "d" * 64, "e" * 64, "f" * 64


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [("bytes_hash", "bytes", [("a", "c", 0.0)]), ("pixels_hash", "pixels", [("a", "b", 0.0), ("a", "c", 0.0)])],
)
def test_equal_hashes_of_the_column_are_pairs(warehouse, column, kind, expected):
    shard = exact_shard(warehouse, "s", {"b": (LIGHT, RED), "a": (DARK, RED), "c": (DARK, RED), "d": (RED, DARK)})
    outcome = find_exact_pairs(pool(shard), EXACT, column=column, warehouse=warehouse)
    assert outcome.ref.kind == kind
    assert rows(read_pairs(outcome.ref, warehouse)) == expected
    assert not outcome.cached
    assert find_exact_pairs(pool(shard), EXACT, column=column, warehouse=warehouse).cached


def test_null_hashes_equal_nothing(warehouse):
    shard = exact_shard(warehouse, "s", {"a": (DARK, None), "b": (LIGHT, None), "c": (DARK, None)})
    found = {
        column: rows(
            read_pairs(find_exact_pairs(pool(shard), EXACT, column=column, warehouse=warehouse).ref, warehouse)
        )
        for column in ("bytes_hash", "pixels_hash")
    }
    assert found == {"bytes_hash": [("a", "c", 0.0)], "pixels_hash": []}


def test_hashes_that_only_begin_alike_are_not_equal(warehouse):
    shard = exact_shard(warehouse, "s", {"a": ("0" * 63 + "1", None), "b": ("0" * 63 + "2", None)})
    assert not rows(
        read_pairs(find_exact_pairs(pool(shard), EXACT, column="bytes_hash", warehouse=warehouse).ref, warehouse)
    )


def test_new_samples_join_the_group_that_was_there(warehouse):
    old = exact_shard(warehouse, "old", {"b": (DARK, None), "d": (DARK, None), "e": (RED, None), "f": (RED, None)})
    new = exact_shard(warehouse, "new", {"a": (LIGHT, None), "c": (DARK, None)})
    first = find_exact_pairs(pool(old), EXACT, column="bytes_hash", warehouse=warehouse)
    grown = find_exact_pairs(pool(old, new), EXACT, column="bytes_hash", warehouse=warehouse)
    (path,) = set(grown.ref.paths) - set(first.ref.paths)
    assert rows(warehouse.read_table(path)) == [("b", "c", 0.0), ("b", "d", 0.0)]
    assert rows(expand_pairs(read_pairs(grown.ref, warehouse))) == [
        ("b", "c", 0.0),
        ("b", "d", 0.0),
        ("c", "d", 0.0),
        ("e", "f", 0.0),
    ]


def test_other_columns_are_refused(warehouse):
    shard = exact_shard(warehouse, "s", {"a": (DARK, DARK)})
    with pytest.raises(PairsError, match=r"can't be found by 'phash'\. Columns: bytes_hash, pixels_hash"):
        find_exact_pairs(pool(shard), EXACT, column="phash", warehouse=warehouse)


def test_a_signal_that_measures_something_else_is_refused(warehouse):
    shard = perceptual_shard(warehouse, "s", {"a": 1})
    with pytest.raises(PairsError, match=r"perceptual@p1 has no column 'bytes_hash'"):
        find_exact_pairs(pool(shard), PERCEPTUAL, column="bytes_hash", warehouse=warehouse)
