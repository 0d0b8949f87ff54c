"""Check (j), on the whole snapshot: no sample is trained on that is also evaluated on.

Where the snapshot was decided on hashes these are compared, and nothing is read again; else the files' bytes are.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.refs import SnapshotRef
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.training.preflight.finding import Finding, Status

CONTAMINATION = "contamination"
BATCH_ROWS = 256
NAMED = 5
WANTED = "nothing in validation or test that is also in train"


@dataclass
class _Sides:
    """Values of the train split and of the held-out splits, each with a sample that has it."""

    train: dict[Any, str] = field(default_factory=dict)
    held_out: dict[Any, str] = field(default_factory=dict)

    def both(self) -> list[tuple[str, str]]:
        """Pairs of samples, train and held out, that have the same value."""
        return [(self.train[value], held) for value, held in self.held_out.items() if value in self.train]


def check_contamination(snapshot: SnapshotRef, warehouse: Warehouse) -> list[Finding]:
    """Compare the train split with validation and test: ids, files, pixels and perceptual codes.

    The same id, file or pixels on both sides fail. Equal perceptual codes are noted, as different images can share
    one; so are images shared by documents, where logos and buttons recur.
    """
    manifest = read_manifest(warehouse, snapshot)
    if manifest.documents:
        compared: dict[str, Callable[[pa.RecordBatch], Iterator[Any]]] = {
            "document_id": lambda batch: iter(batch["document_id"].to_pylist()),
            "image files": _document_images,
        }
        paths, columns, name = [e.path for e in manifest.documents], ["document_id", "images", "split"], "document_id"
    else:
        paths, name = [entry.path for entry in manifest.curated], "sample_id"
        measured = _columns(paths, warehouse)
        compared = {"sample_id": lambda batch: iter(batch["sample_id"].to_pylist())}
        columns = ["sample_id", "split", *sorted({"bytes_hash", "pixels_hash", "phash", "flat"} & measured)]
        if "bytes_hash" in measured:
            compared["image files"] = lambda batch: iter(batch["bytes_hash"].to_pylist())
        else:
            columns.append("image")
            compared["image files"] = _files
        if "pixels_hash" in measured:
            compared["pixels"] = lambda batch: iter(batch["pixels_hash"].to_pylist())
        if {"phash", "flat"} <= measured:
            compared["perceptual codes"] = _codes
    sides = {what: _Sides() for what in compared}
    for path in paths:
        with warehouse.open_parquet(path) as shard:
            for batch in shard.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for what, values in compared.items():
                    _collect(sides[what], batch, name, values(batch))
    return [_finding(what, side, documents=bool(manifest.documents)) for what, side in sides.items()]


def _columns(paths: list[str], warehouse: Warehouse) -> set[str]:
    """Columns that all shards have."""
    found: list[set[str]] = []
    for path in paths:
        with warehouse.open_parquet(path) as shard:
            found.append(set(shard.schema_arrow.names))
    return set.intersection(*found) if found else set()


def _collect(side: _Sides, batch: pa.RecordBatch, name: str, values: Iterator[Any]) -> None:
    for identity, split, value in zip(batch[name].to_pylist(), batch["split"].to_pylist(), values, strict=True):
        target = side.train if split == "train" else side.held_out
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                target.setdefault(one, identity)


def _files(batch: pa.RecordBatch) -> Iterator[bytes | None]:
    for data in pc.struct_field(batch["image"], "bytes"):
        yield hashlib.sha256(data.as_buffer()).digest() if data.is_valid else None


def _document_images(batch: pa.RecordBatch) -> Iterator[list[bytes]]:
    for images in batch["images"].to_pylist():
        yield [hashlib.sha256(image["bytes"]).digest() for image in images if image and image["bytes"]]


def _codes(batch: pa.RecordBatch) -> Iterator[int | None]:
    """Perceptual codes, but not of images too flat to have one."""
    return iter(pc.if_else(batch["flat"], None, batch["phash"]).to_pylist())


def _finding(what: str, side: _Sides, *, documents: bool) -> Finding:
    shared = side.both()
    may_differ = what == "perceptual codes" or (documents and what == "image files")
    status: Status = "ok" if not shared else "noted" if may_differ else "failed"
    named = ", ".join(f"{train} = {held}" for train, held in shared[:NAMED])
    return Finding(
        CONTAMINATION,
        what,
        status,
        f"{len(shared)} of {len(side.held_out)} held-out ones are trained on: {named}" if shared else "none in common",
        WANTED,
        "" if not shared else "Give the policy a duplicate rule for them (copies then share a split), and curate again.",
    )
