"""Ingest: reads a source into a pool, original bytes unchanged, what can't be read into quarantine with its reason.

Samples the pool holds are not added again, and a run killed at any moment is completed by running it again.
"""

import fcntl
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa

from storage import schema
from storage.fingerprint import canonical_json, fingerprint
from storage.pool import read_pool
from storage.record import Record, read_record, write_record
from storage.refs import Outcome, PoolRef, ShardRef
from storage.warehouse import TEMPORARY, Warehouse, check_name
from tasks.curation.image_check import check_image
from tasks.curation.known_ids import KnownIds
from tasks.curation.sources.contract import (
    MAX_IMAGE_BYTES,
    Fault,
    Format,
    RawSample,
    Reason,
    Row,
    RowError,
    SourceFile,
)
from tasks.curation.sources.files import file_exists
from tasks.curation.sources.find import find_source_files
from tasks.curation.sources.read import read_rows
from tasks.curation.sources.text import caption_text, metadata_json, valid_text

VERSION = 1
SHARD_SAMPLES = 1_000
SHARD_BYTES = 128 * 2**20
"""Image bytes after which a shard ends early: what is in memory at once is about twice this."""

MAX_DETAIL_CHARACTERS = 500

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestedFile:
    """What became of one source file: new shards, and how many rows were new, known or put into quarantine."""

    uri: str
    shards: tuple[str, ...]
    samples: int
    known: int
    quarantined: int


@dataclass(frozen=True)
class PoolContents:
    """A pool to ingest into, and the ids it holds. Share one between files so that each id is read once."""

    warehouse: Warehouse
    pool: str

    @cached_property
    def samples(self) -> KnownIds:
        """Ids of the pool's samples."""
        return KnownIds(self.warehouse, f"pools/{self.pool}", "sample_id")

    @cached_property
    def quarantine(self) -> KnownIds:
        """Ids of the pool's quarantined rows."""
        return KnownIds(self.warehouse, f"quarantine/{self.pool}", "quarantine_id")

    def __getstate__(self) -> dict[str, Any]:
        return {"warehouse": self.warehouse, "pool": self.pool}


def ingest(
    source: str,
    *,
    pool: str,
    warehouse: Warehouse,
    format: Format | Literal["auto"] = "auto",
    image_column: str | None = None,
    caption_column: str | None = None,
    key_column: str | None = None,
    image_folder: str | None = None,
    shard_samples: int = SHARD_SAMPLES,
) -> Outcome[PoolRef]:
    """Add a source's new samples to a pool, which is made if there is none; returns the pool as it then stands.

    What `source` may be is described at `find_source_files`. Cached means that no file of it has changed since it
    was ingested; none is read then. Raises `SourceError` for a source that can't be read as asked and
    `WarehouseError` for a pool name that can't be used.
    """
    contents = PoolContents(warehouse, check_name(pool, "pool"))
    files = find_source_files(
        source,
        format=format,
        image_column=image_column,
        caption_column=caption_column,
        key_column=key_column,
        image_folder=image_folder,
    )
    outcomes = [ingest_file(file, contents=contents, shard_samples=shard_samples) for file in files]
    return Outcome(read_pool(warehouse, pool), cached=all(outcome.cached for outcome in outcomes))


def ingest_file(
    file: SourceFile, *, contents: PoolContents, shard_samples: int = SHARD_SAMPLES
) -> Outcome[IngestedFile]:
    """Add one source file's new samples to a pool.

    The file is cut into chunks of `shard_samples` rows or `SHARD_BYTES`, counted from its beginning whatever is
    known already, so a repeated run makes the same shards. Of each chunk the quarantine is written before the
    shard of new samples. Files of one pool may be ingested at once by processes of one machine; samples that two
    of them share then go to whichever comes first. The ledger has an entry for a file when it was read to its end;
    it is read again when it, or an image that it names and that was missing, has appeared or changed.
    """
    check_name(contents.pool, "pool")
    entry = _ledger_entry(file, contents, shard_samples)
    if isinstance(entry, IngestedFile):
        return Outcome(entry, cached=True)
    counts: Counter[str] = Counter(samples=0, known=0)
    shards, missing = [], set()
    for rows in _chunks(read_rows(file), shard_samples):
        chunk = _examine(rows, file, contents)
        _publish_quarantine(chunk.faults, contents)
        if (shard := _publish_samples(chunk, contents)) is not None:
            shards.append(shard.name)
            counts["samples"] += shard.rows
        counts["known"] += chunk.known
        counts.update(row["reason"] for row in chunk.faults)
        missing |= chunk.missing
    result = {"uri": file.uri, "shards": shards, "missing": sorted(missing)}
    config = {"version": VERSION, "pool": contents.pool, "shard_samples": shard_samples}
    record = Record("ingest", entry, config, asdict(file), dict(counts), result)
    write_record(contents.warehouse, _ledger_path(contents, entry), record)
    done = _ingested(record)
    logger.info("%s: %d new samples, %d known, %d in quarantine", file.uri, done.samples, done.known, done.quarantined)
    return Outcome(done, cached=False)


def _ledger_path(contents: PoolContents, entry: str) -> str:
    return f"ledgers/{contents.pool}/{entry}.json"


def _ledger_entry(file: SourceFile, contents: PoolContents, shard_samples: int) -> IngestedFile | str:
    """Return what the ledger says of an unchanged file, or the name of the entry to write when it has been read."""
    found: list[str] = []
    while True:
        entry = fingerprint([VERSION, file, shard_samples, found])
        record = read_record(contents.warehouse, _ledger_path(contents, entry))
        if record is None:
            return entry
        paths = [ShardRef(contents.pool, name, 0).path for name in record.result["shards"]]
        if not all(contents.warehouse.exists(path) for path in paths):
            return entry
        appeared = [path for path in record.result["missing"] if file_exists(path)]
        if not appeared:
            return _ingested(record)
        found += appeared


def _ingested(record: Record) -> IngestedFile:
    counts = dict(record.counts)
    samples, known = counts.pop("samples"), counts.pop("known")
    return IngestedFile(record.result["uri"], tuple(record.result["shards"]), samples, known, sum(counts.values()))


def _chunks(rows: Iterable[Row], shard_samples: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.data or b"")
        if len(chunk) >= shard_samples or size >= SHARD_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@dataclass
class _Chunk:
    samples: list[dict[str, Any]]
    faults: list[dict[str, Any]]
    missing: set[str]
    known: int


def _examine(rows: Iterable[Row], file: SourceFile, contents: PoolContents) -> _Chunk:
    """Sort rows into samples the pool lacks, faults, and a count of those it has; only new images are checked."""
    contents.samples.refresh()
    chunk = _Chunk([], [], set(), 0)
    seen: set[str] = set()
    for row in rows:
        if isinstance(row, RawSample):
            try:
                sample = _sample(row, file)
                identifier = sample["sample_id"]
                if identifier in seen or identifier in contents.samples:
                    chunk.known += 1
                    continue
                check_image(sample["image"]["bytes"])
            except RowError as error:
                row = Fault.of(error, key=row.key, member=row.member, data=row.data)
            else:
                seen.add(identifier)
                chunk.samples.append(sample)
                continue
        chunk.faults.append(_quarantine_row(row, file))
        if row.missing_path is not None:
            chunk.missing.add(row.missing_path)
    return chunk


def _sample(raw: RawSample, file: SourceFile) -> dict[str, Any]:
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
        "source": {"path": valid_text(file.uri), "member": valid_text(raw.member)},
        "metadata": metadata_json(raw.metadata),
    }


def sample_id(key: str, image: bytes, caption: str) -> str:
    """Return a sample's id: 32 hex digits of sha256 over key, image and caption, each after its length in 8 bytes."""
    digest = hashlib.sha256()
    for part in (key.encode(), image, caption.encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _quarantine_row(fault: Fault, file: SourceFile) -> dict[str, Any]:
    digest = None if fault.data is None else hashlib.sha256(fault.data).hexdigest()
    source = {"path": valid_text(file.uri), "member": valid_text(fault.member)}
    identity = canonical_json([source, fault.reason.value, digest])
    return {
        "quarantine_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
        "key": None if fault.key is None else valid_text(fault.key),
        "source": source,
        "reason": fault.reason.value,
        "detail": valid_text(fault.detail)[:MAX_DETAIL_CHARACTERS],
        "digest": digest,
        "size": None if fault.data is None else len(fault.data),
    }


def _publish_quarantine(faults: list[dict[str, Any]], contents: PoolContents) -> None:
    if not faults:
        return
    with _exclusive(contents):
        contents.quarantine.refresh()
        new = {row["quarantine_id"]: row for row in faults if row["quarantine_id"] not in contents.quarantine}
        if new:
            name = f"{_content_name(new)}.parquet"
            table = pa.Table.from_pylist(list(new.values()), schema.QUARANTINE)
            contents.warehouse.write_table(f"quarantine/{contents.pool}/{name}", table)
            contents.quarantine.add(name, new)


def _publish_samples(chunk: _Chunk, contents: PoolContents) -> ShardRef | None:
    if not chunk.samples:
        return None
    with _exclusive(contents):
        contents.samples.refresh()
        new = {row["sample_id"]: row for row in chunk.samples if row["sample_id"] not in contents.samples}
        chunk.known += len(chunk.samples) - len(new)
        if not new:
            return None
        rows = list(new.values())
        described = ({**row, "image": row["image"]["path"]} for row in rows)  # the id covers the image's bytes
        shard = ShardRef(contents.pool, _content_name(map(canonical_json, described)), len(rows))
        contents.warehouse.write_table(shard.path, pa.Table.from_pylist(rows, schema.SAMPLES))
        contents.samples.add(f"{shard.name}.parquet", new)
    logger.info("pool %s: shard %s, %d samples", shard.pool, shard.name, shard.rows)
    return shard


def _content_name(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:32]


@contextmanager
def _exclusive(contents: PoolContents) -> Iterator[None]:
    """Let one writer at a time add to a pool, if it is on this machine's disk: the kernel frees a dead one's lock."""
    if not contents.warehouse.is_local:
        yield
        return
    file = contents.warehouse.local_path(f"{TEMPORARY}/ingest-{contents.pool}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:  # opening for writing also keeps it from looking stale
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(file)
        yield
