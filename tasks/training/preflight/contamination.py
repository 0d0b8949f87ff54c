"""Check (j), on the whole snapshot: no sample is trained on that is also evaluated on.

Where the snapshot was decided on hashes these are compared, and nothing is read again; else the files' bytes are.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.refs import SnapshotRef
from storage.snapshot import Manifest, read_manifest
from storage.warehouse import Warehouse
from tasks.training.preflight.finding import Finding, Status

CONTAMINATION = "contamination"
BATCH_ROWS = 256
NAMED = 5
WANTED = "nothing in validation or test that is also in train"


@dataclass
class _Comparison:
    """What rows of the train split have in common with held-out ones.

    `values` gives a row's value, None or a list of them; `columns` are those it reads. `train` and `held_out` map each
    value to the id of a row that has it.
    """

    what: str
    columns: tuple[str, ...]
    values: Callable[[pa.RecordBatch], Iterable[Any]]
    shared: Status = "failed"
    train: dict[Any, str] = field(default_factory=dict)
    held_out: dict[Any, str] = field(default_factory=dict)

    def add(self, batch: pa.RecordBatch) -> None:
        """Take in rows; their first column is the id."""
        rows = zip(batch[0].to_pylist(), batch["split"].to_pylist(), self.values(batch), strict=True)
        for identity, split, value in rows:
            side = self.train if split == "train" else self.held_out
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    side.setdefault(one, identity)

    def finding(self) -> Finding:
        """Say what is on both sides."""
        both = [(self.train[value], held) for value, held in self.held_out.items() if value in self.train]
        if not both:
            return Finding(CONTAMINATION, self.what, "ok", f"none of {len(self.held_out)} held out", WANTED)
        named = ", ".join(f"{train} = {held}" for train, held in both[:NAMED])
        measured = f"{len(both)} of {len(self.held_out)} held out are trained on: {named}"
        remedy = "Give the policy a duplicate rule for them, so that copies share a split, and curate again."
        return Finding(CONTAMINATION, self.what, self.shared, measured, WANTED, remedy)


def check_contamination(snapshot: SnapshotRef, warehouse: Warehouse) -> list[Finding]:
    """Compare the train split with validation and test: ids, files, pixels and perceptual codes.

    The same id, file or pixels on both sides fail. Equal perceptual codes are noted, as different images can share
    one; so are images shared by documents, where logos and buttons recur.
    """
    manifest = read_manifest(warehouse, snapshot)
    comparisons = _of_documents() if manifest.documents else _of_samples(_columns(manifest, warehouse))
    columns = list(dict.fromkeys([*(name for c in comparisons for name in c.columns), "split"]))
    for entry in manifest.documents or manifest.curated:
        with warehouse.open_parquet(entry.path) as shard:
            for rows in shard.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                batch = rows.select(columns)
                for comparison in comparisons:
                    comparison.add(batch)
    return [comparison.finding() for comparison in comparisons]


def _of_documents() -> list[_Comparison]:
    return [
        _Comparison("document_id", ("document_id",), _column("document_id")),
        _Comparison("image files", ("images",), _document_images, shared="noted"),
    ]


def _of_samples(measured: set[str]) -> list[_Comparison]:
    comparisons = [_Comparison("sample_id", ("sample_id",), _column("sample_id"))]
    if "bytes_hash" in measured:
        comparisons.append(_Comparison("image files", ("bytes_hash",), _column("bytes_hash")))
    else:
        comparisons.append(_Comparison("image files", ("image",), _files))
    if "pixels_hash" in measured:
        comparisons.append(_Comparison("pixels", ("pixels_hash",), _column("pixels_hash")))
    if {"phash", "flat"} <= measured:
        comparisons.append(_Comparison("perceptual codes", ("phash", "flat"), _codes, shared="noted"))
    return comparisons


def _columns(manifest: Manifest, warehouse: Warehouse) -> set[str]:
    """Columns that all shards have."""
    found: list[set[str]] = []
    for entry in manifest.curated:
        with warehouse.open_parquet(entry.path) as shard:
            found.append(set(shard.schema_arrow.names))
    return set.intersection(*found) if found else set()


def _column(name: str) -> Callable[[pa.RecordBatch], Iterable[Any]]:
    return lambda batch: batch[name].to_pylist()


def _files(batch: pa.RecordBatch) -> Iterator[bytes | None]:
    for data in pc.struct_field(batch["image"], "bytes"):
        yield hashlib.sha256(data.as_buffer()).digest() if data.is_valid else None


def _document_images(batch: pa.RecordBatch) -> Iterator[list[bytes]]:
    for images in batch["images"].to_pylist():
        yield [hashlib.sha256(image["bytes"]).digest() for image in images if image and image["bytes"]]


def _codes(batch: pa.RecordBatch) -> Iterable[int | None]:
    """Perceptual codes, but not of images too flat to have one."""
    codes: list[int | None] = pc.if_else(batch["flat"], None, batch["phash"]).to_pylist()
    return codes
