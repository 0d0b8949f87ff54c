import threading
from pathlib import Path

import pyarrow as pa
import pytest

from storage.expire import Expired, expire
from storage.refs import RunRef, SnapshotRef
from storage.schema import CURATED, DIFFERENCE, RUNS
from storage.snapshot import Draft, FileEntry, commit, numbers
from storage.warehouse import Warehouse, WarehouseError


def publish(warehouse: Warehouse, *names: str) -> SnapshotRef:
    """Publish a snapshot of one curated file for each name; equal names share their file."""
    entries = []
    for name in names:
        path = f"snapshots/d/curated/{name}.parquet"
        warehouse.write_table(path, pa.Table.from_pylist([{"sample_id": name}], schema=CURATED))
        entries.append(FileEntry(path=path, rows=1, bytes=1, sha256=name, pool_shard=name))
    draft = Draft(
        pool="p",
        pool_shards=names,
        policy={},
        signals={},
        pairs={},
        decisions=tuple(entries),
        curated=tuple(entries),
        published=None,
        counts={},
    )
    ref = commit(warehouse, "d", lambda parent: draft).ref
    warehouse.write_table(ref.difference, DIFFERENCE.empty_table())
    return ref


def train_on(warehouse: Warehouse, snapshot: SnapshotRef) -> None:
    row = dict.fromkeys(RUNS.names) | {"dataset": snapshot.dataset, "snapshot": snapshot.number}
    warehouse.write_table(RunRef("r1").table, pa.Table.from_pylist([row], schema=RUNS))


def files(warehouse: Warehouse) -> list[str]:
    return warehouse.names("snapshots/d/curated")


def test_old_snapshots_go_with_the_files_that_only_they_name(warehouse: Warehouse) -> None:
    publish(warehouse, "a", "b")
    publish(warehouse, "b", "c")
    last = publish(warehouse, "c")
    expired = expire(warehouse, "d", keep=1)
    assert expired.snapshots == (1, 2)
    assert (numbers(warehouse, "d"), files(warehouse)) == ([3], ["c.parquet"])
    assert warehouse.names("snapshots/d/differences") == [Path(last.difference).name]


def test_a_snapshot_that_a_run_was_trained_on_stays(warehouse: Warehouse) -> None:
    first = publish(warehouse, "a")
    publish(warehouse, "b")
    publish(warehouse, "c")
    train_on(warehouse, first)
    assert expire(warehouse, "d", keep=1).snapshots == (2,)
    assert (numbers(warehouse, "d"), files(warehouse)) == ([1, 3], ["a.parquet", "c.parquet"])


def test_a_snapshot_that_is_still_to_be_compared_with_the_one_before_keeps_it(warehouse: Warehouse) -> None:
    publish(warehouse, "a")
    publish(warehouse, "b")
    last = publish(warehouse, "c")
    warehouse.remove(last.difference)  # killed between publishing and comparing
    assert expire(warehouse, "d", keep=1).snapshots == (1,)
    warehouse.write_table(last.difference, DIFFERENCE.empty_table())
    assert expire(warehouse, "d", keep=1).snapshots == (2,)


def test_a_dry_run_says_the_same_and_removes_nothing(warehouse: Warehouse) -> None:
    publish(warehouse, "a")
    publish(warehouse, "b")
    planned = expire(warehouse, "d", keep=1, dry_run=True)
    assert numbers(warehouse, "d") == [1, 2]
    assert files(warehouse) == ["a.parquet", "b.parquet"]
    assert expire(warehouse, "d", keep=1) == planned


def test_what_a_killed_publish_left_goes_too(warehouse: Warehouse) -> None:
    publish(warehouse, "a")
    warehouse.create_bytes("snapshots/d/curated/orphan.parquet", b"half a snapshot")
    assert expire(warehouse, "d", keep=1) == Expired("d", (), ("snapshots/d/curated/orphan.parquet",))
    assert files(warehouse) == ["a.parquet"]


def test_the_next_number_follows_the_highest_that_is_left(warehouse: Warehouse) -> None:
    for name in "abc":
        publish(warehouse, name)
    expire(warehouse, "d", keep=1)
    assert publish(warehouse, "d").number == 4


def test_expiry_waits_for_publishing_under_way(tmp_path: Path) -> None:
    warehouse = Warehouse(str(tmp_path))
    publish(warehouse, "a")
    publish(warehouse, "b")
    expiry = threading.Thread(target=expire, args=(warehouse, "d"), kwargs={"keep": 1})
    with warehouse.locked("publish-d", shared=True):
        expiry.start()
        expiry.join(0.3)
        assert expiry.is_alive()
        assert numbers(warehouse, "d") == [1, 2]
    expiry.join(30)
    assert numbers(warehouse, "d") == [2]


@pytest.mark.parametrize(("dataset", "keep", "message"), [("d", 0, "at least 1"), ("none", 1, "has no snapshot")])
def test_nonsense_is_refused(warehouse: Warehouse, dataset: str, keep: int, message: str) -> None:
    publish(warehouse, "a")
    with pytest.raises(WarehouseError, match=message):
        expire(warehouse, dataset, keep=keep)
