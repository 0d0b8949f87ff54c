import multiprocessing
from dataclasses import replace

import pytest

from storage.refs import SnapshotRef
from storage.snapshot import Draft, FileEntry, Manifest, commit, find_snapshot, latest, numbers, read_manifest
from storage.warehouse import Warehouse, WarehouseError

ENTRY = FileEntry(path="snapshots/d/curated/x.parquet", rows=1, bytes=10, sha256="0" * 64, pool_shard="x")
DRAFT = Draft(
    pool="p",
    pool_shards=("x",),
    policy={"name": "default"},
    signals={"size": "12"},
    pairs={},
    decisions=(ENTRY,),
    curated=(ENTRY,),
    published=None,
    counts={"samples": 1},
)


def test_snapshots_are_numbered_from_one_and_know_their_parent(warehouse: Warehouse) -> None:
    first = commit(warehouse, "d", lambda parent: DRAFT)
    second = commit(warehouse, "d", lambda parent: replace(DRAFT, counts={"samples": 2}))
    assert (first.ref, second.ref) == (SnapshotRef("d", 1), SnapshotRef("d", 2))
    assert read_manifest(warehouse, second.ref).parent == 1
    assert latest(warehouse, "d") == read_manifest(warehouse, second.ref)


def test_a_manifest_reads_back_as_it_was_committed(warehouse: Warehouse) -> None:
    manifest = read_manifest(warehouse, commit(warehouse, "d", lambda parent: DRAFT).ref)
    assert manifest.content == DRAFT.content
    assert manifest.curated == (ENTRY,)


def test_other_reasons_for_the_same_samples_leave_what_training_depends_on() -> None:
    stricter = replace(DRAFT, policy={"name": "strict"}, counts={"samples": 1, "failed": 1})
    fewer = replace(DRAFT, curated=(replace(ENTRY, sha256="1" * 64),))
    assert stricter.content != DRAFT.content
    assert stricter.samples_content == DRAFT.samples_content != fewer.samples_content


def test_publishing_the_same_again_publishes_nothing(warehouse: Warehouse) -> None:
    commit(warehouse, "d", lambda parent: DRAFT)
    again = commit(warehouse, "d", lambda parent: DRAFT)
    assert again.cached
    assert numbers(warehouse, "d") == [1]


def test_a_lost_race_builds_again_on_the_winner(warehouse: Warehouse) -> None:
    parents: list[int | None] = []

    def build(parent: Manifest | None) -> Draft:
        parents.append(parent.number if parent else None)
        if len(parents) == 1:
            commit(warehouse, "d", lambda _: DRAFT)
        return replace(DRAFT, counts={"samples": 99})

    assert commit(warehouse, "d", build).ref.number == 2
    assert parents == [None, 1]


def _commit_many(root: str, writer: int) -> None:
    for i in range(10):
        commit(Warehouse(root), "d", lambda parent, i=i: replace(DRAFT, counts={"writer": writer, "i": i}))


def test_writers_in_several_processes_lose_nothing(tmp_path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_commit_many, args=(str(tmp_path), n)) for n in range(3)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    warehouse = Warehouse(str(tmp_path))
    assert numbers(warehouse, "d") == list(range(1, 31))
    seen = {tuple(read_manifest(warehouse, SnapshotRef("d", n)).counts.items()) for n in range(1, 31)}
    assert len(seen) == 30


def test_a_missing_snapshot_names_those_that_exist(warehouse: Warehouse) -> None:
    commit(warehouse, "d", lambda parent: DRAFT)
    with pytest.raises(WarehouseError, match=r"no snapshot 9 \(there are: 1\)"):
        find_snapshot(warehouse, "d", 9)
    with pytest.raises(WarehouseError, match=r"datasets: d"):
        find_snapshot(warehouse, "other")
