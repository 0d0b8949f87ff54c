"""Adds rows of a source to a pool: new samples as one shard, faults to quarantine, both named by their content."""

import fcntl
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from storage import schema
from storage.fingerprint import canonical_json
from storage.refs import ShardRef
from storage.warehouse import TEMPORARY, Warehouse
from tasks.curation.image_check import check_image
from tasks.curation.known_ids import KnownIds
from tasks.curation.quarantine import quarantine_row
from tasks.curation.sources.contract import MAX_IMAGE_BYTES, Fault, RawSample, Reason, Row, RowError
from tasks.curation.sources.text import caption_text, metadata_json, valid_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Added:
    """What became of some rows: the shard of new samples, and how many rows were known or faulty, by reason.

    `missing` are the image files that rows named and that were not there.
    """

    shard: ShardRef | None
    known: int
    reasons: Counter[str]
    missing: frozenset[str]


@dataclass(frozen=True)
class Examined:
    """Rows of the source file `path`, told apart: samples by id, faults, and how many were known to the pool."""

    path: str
    samples: dict[str, dict[str, Any]]
    faults: list[Fault]
    known: int


class PoolWriter:
    """Writes to one pool. What the pool holds is read as it is needed, once; `for_pool` gives a shared writer."""

    def __init__(self, warehouse: Warehouse, pool: str) -> None:
        self.warehouse, self.pool = warehouse, pool
        self.samples = KnownIds(warehouse, f"pools/{pool}", "sample_id")
        self.quarantine = KnownIds(warehouse, f"quarantine/{pool}", "quarantine_id")

    @staticmethod
    @lru_cache(maxsize=8)
    def for_pool(warehouse: Warehouse, pool: str) -> "PoolWriter":
        """Return this process's writer for a pool, so that ids are read once and not once for every source file."""
        return PoolWriter(warehouse, pool)

    def examine(self, rows: Iterable[Row], path: str) -> Examined:
        """Tell the rows of the source file `path` apart. Images of known samples are not checked again."""
        self.samples.refresh()
        samples: dict[str, dict[str, Any]] = {}
        faults: list[Fault] = []
        known = 0
        for row in rows:
            try:
                if isinstance(row, Fault):
                    faults.append(row)
                    continue
                sample = _sample(row, path)
                identifier = sample["sample_id"]
                if identifier in samples or identifier in self.samples:
                    known += 1
                    continue
                check_image(sample["image"]["bytes"])
                samples[identifier] = sample
            except RowError as error:
                faults.append(Fault.of(error, key=row.key, member=row.member, data=row.data))
        return Examined(path, samples, faults, known)

    def add(self, rows: Examined) -> Added:
        """Add the rows that the pool lacks: first those at fault, then the samples.

        The same rows in the same order make the same objects.
        """
        self.write_faults(rows.faults, rows.path)
        shard = self._write_samples(rows.samples)
        known = rows.known + len(rows.samples) - (shard.rows if shard else 0)
        missing = frozenset(fault.missing_path for fault in rows.faults if fault.missing_path is not None)
        return Added(shard, known, Counter(fault.reason.value for fault in rows.faults), missing)

    def write_faults(self, faults: Iterable[Fault], path: str) -> None:
        """Put the faults of the source file `path` into quarantine, each once."""
        rows = [quarantine_row(fault, path) for fault in faults]
        if not rows:
            return
        with self.alone():
            self.quarantine.refresh()
            new = {row["quarantine_id"]: row for row in rows if row["quarantine_id"] not in self.quarantine}
            if new:
                name = f"{hash_of(new)}.parquet"
                table = pa.Table.from_pylist(list(new.values()), schema.QUARANTINE)
                self.warehouse.write_table(f"quarantine/{self.pool}/{name}", table)
                self.quarantine.add(name, new)

    def _write_samples(self, samples: dict[str, dict[str, Any]]) -> ShardRef | None:
        if not samples:
            return None
        with self.alone():
            self.samples.refresh()
            rows = [row for identifier, row in samples.items() if identifier not in self.samples]
            if not rows:
                return None
            described = ({**row, "image": row["image"]["path"]} for row in rows)  # the id covers the image's bytes
            shard = ShardRef(self.pool, hash_of(map(canonical_json, described)), len(rows))
            self.warehouse.write_table(shard.path, pa.Table.from_pylist(rows, schema.SAMPLES))
            self.samples.add(f"{shard.name}.parquet", [row["sample_id"] for row in rows])
        logger.info("Pool %s: shard %s, %d samples", shard.pool, shard.name, shard.rows)
        return shard

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other writers to the pool on this machine out; the kernel frees the lock of one that dies."""
        if not self.warehouse.is_local:
            yield
            return
        file = self.warehouse.local_path(f"{TEMPORARY}/ingest-{self.pool}.lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.utime(file)  # or it would be removed as stale
            yield


def sample_id(key: str, image: bytes, caption: str) -> str:
    """Return a sample's id: 32 hex digits of sha256 over key, image and caption, each after its length in 8 bytes."""
    digest = hashlib.sha256()
    for part in (key.encode(), image, caption.encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _sample(raw: RawSample, path: str) -> dict[str, Any]:
    if raw.image is None:
        raise RowError(Reason.MISSING_IMAGE, "the row has no image")
    if len(raw.image) > MAX_IMAGE_BYTES:
        raise RowError(Reason.TOO_LARGE, f"{len(raw.image):,} bytes, over {MAX_IMAGE_BYTES:,}")
    caption = caption_text(raw.caption)
    key = valid_text(raw.key) if raw.key is not None else hashlib.sha256(raw.image).hexdigest()[:16]
    return {
        "sample_id": sample_id(key, raw.image, caption),
        "key": key,
        "image": {"bytes": raw.image, "path": raw.image_name and valid_text(raw.image_name)},
        "caption": caption,
        "url": raw.url and valid_text(raw.url),
        "source": {"path": valid_text(path), "member": valid_text(raw.member)},
        "metadata": metadata_json(raw.metadata),
    }


def hash_of(parts: Iterable[str]) -> str:
    """Return 32 hex digits of sha256 over some texts, each after its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:32]
