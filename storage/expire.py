"""Expiry: old snapshots of a dataset go, with the files that no other snapshot names.

What is left reads exactly as before. Samples, signals and pairs are evidence and stay: the next snapshot needs them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from storage.catalog import write_catalog
from storage.refs import SnapshotRef
from storage.snapshot import numbers, read_manifest
from storage.warehouse import Warehouse, WarehouseError

FOLDERS = (
    *("curated", "decisions", "documents", "document_decisions", "node_decisions"),
    *("published", "differences", "reports"),
)


@dataclass(frozen=True)
class Expired:
    """What expiry removed, or would remove: numbers of snapshots, and paths of files no other one names."""

    dataset: str
    snapshots: tuple[int, ...]
    files: tuple[str, ...]


def expire(warehouse: Warehouse, dataset: str, *, keep: int, dry_run: bool = False) -> Expired:
    """Remove all snapshots of a dataset but the latest `keep` and those that a run or an evaluation names.

    What one of these was made after stays too until the two have been compared.
    Manifests go first, so a snapshot is either whole or not there; what a killed expiry or publish left behind goes
    with the next one. Waits for publishing under way on this machine; on a remote warehouse nobody else may publish
    the same dataset meanwhile. With `dry_run` nothing is removed. Raises `WarehouseError` unless `keep` is at least 1
    and the dataset exists.
    """
    if keep < 1:
        raise WarehouseError(f"keep is {keep}: a dataset keeps its latest snapshot. Give at least 1.")
    with warehouse.locked(f"publish-{dataset}", shared=False):
        known = numbers(warehouse, dataset)
        if not known:
            raise WarehouseError(f"{warehouse.root}: dataset {dataset!r} has no snapshot, so none can expire.")
        needed = {*known[-keep:], *_used(warehouse, dataset)}.intersection(known)
        needed |= {*_uncompared(warehouse, dataset, needed)}.intersection(known)
        old = tuple(number for number in known if number not in needed)
        named = {path for number in needed for path in _files(warehouse, SnapshotRef(dataset, number))}
        folders = [f"snapshots/{dataset}/{name}" for name in FOLDERS]
        files = [f"{folder}/{name}" for folder in folders for name in warehouse.names(folder)]
        expired = Expired(dataset, old, tuple(path for path in files if path not in named))
        if not dry_run:
            for number in old:
                warehouse.remove(SnapshotRef(dataset, number).manifest)
            for path in expired.files:
                warehouse.remove(path)
            write_catalog(warehouse)
    return expired


def _used(warehouse: Warehouse, dataset: str) -> Iterator[int]:
    """Numbers of the snapshots that runs and evaluations were made on."""
    for folder, file in (("runs", "run.parquet"), ("evaluations", "evaluation.parquet")):
        for name in warehouse.names(folder):
            path = f"{folder}/{name}/{file}"
            if warehouse.exists(path):
                [row] = warehouse.read_table(path, ["dataset", "snapshot"]).to_pylist()
                if row["dataset"] == dataset:
                    yield row["snapshot"]


def _uncompared(warehouse: Warehouse, dataset: str, snapshots: Iterable[int]) -> Iterator[int]:
    """Numbers of the parents that snapshots are still to be compared with."""
    for number in snapshots:
        manifest = read_manifest(warehouse, SnapshotRef(dataset, number))
        if manifest.parent and not warehouse.exists(manifest.ref.difference):
            yield manifest.parent


def _files(warehouse: Warehouse, snapshot: SnapshotRef) -> Iterator[str]:
    manifest = read_manifest(warehouse, snapshot)
    yield from (entry.path for entry in manifest.files)
    yield from (snapshot.difference, snapshot.report)
