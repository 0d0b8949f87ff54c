"""Ingest: reads a source into a pool, original bytes unchanged, what can't be read into quarantine with its reason.

Samples the pool holds are not added again, and a run killed at any moment is completed by running it again.
"""

import logging
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Literal

from storage.fingerprint import fingerprint
from storage.pool import read_pool
from storage.record import Record, read_record, write_record
from storage.refs import Outcome, PoolRef, ShardRef
from storage.warehouse import Warehouse, check_name
from tasks.curation.pool_writer import Added, PoolWriter
from tasks.curation.sources.contract import Format, Row, SourceFile
from tasks.curation.sources.files import image_is_there
from tasks.curation.sources.find import find_source_files
from tasks.curation.sources.read import read_rows
from tasks.curation.sources.text import valid_text

VERSION = 1
SHARD_SAMPLES = 1_000
SHARD_BYTES = 128 * 2**20
"""Image bytes after which a shard ends early: what is in memory at once is about nine times this."""

__all__ = ["IngestedFile", "SourceFile", "find_source_files", "ingest", "ingest_file"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestedFile:
    """What became of one source file: new shards, and how many rows were new, known or put into quarantine."""

    uri: str
    shards: tuple[str, ...]
    samples: int
    known: int
    quarantined: int

    def __str__(self) -> str:
        name = valid_text(PurePosixPath(self.uri).name)  # a log may refuse a file name that is not UTF-8
        return f"{name}: {self.samples} new samples, {self.known} known, {self.quarantined} in quarantine"


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
    check_name(pool, "pool")
    files = find_source_files(
        source,
        format=format,
        image_column=image_column,
        caption_column=caption_column,
        key_column=key_column,
        image_folder=image_folder,
    )
    outcomes = [ingest_file(file, pool=pool, warehouse=warehouse, shard_samples=shard_samples) for file in files]
    return Outcome(read_pool(warehouse, pool), cached=all(outcome.cached for outcome in outcomes))


def ingest_file(
    file: SourceFile, *, pool: str, warehouse: Warehouse, shard_samples: int = SHARD_SAMPLES
) -> Outcome[IngestedFile]:
    """Add one source file's new samples to a pool.

    The file is cut into chunks of `shard_samples` rows or `SHARD_BYTES`, counted from its beginning whatever the
    pool holds already, so that a run after a killed one makes the same shards. A ledger entry is written when all
    of the file was read; the file is read again only if it changed, if one of its shards was deleted, or if an
    image file that was missing is there now.

    Processes of one machine may add files to a local pool at once; a sample that two files share then goes to
    whichever comes first. To a remote pool, add one file at a time.
    """
    check_name(pool, "pool")
    entry = _ledger_entry(file, pool, warehouse, shard_samples)
    if isinstance(entry, IngestedFile):
        return Outcome(entry, cached=True)
    counts: Counter[str] = Counter(samples=0, known=0)
    shards: list[str] = []
    missing: set[str] = set()
    for added in _added(PoolWriter.for_pool(warehouse, pool), file, shard_samples):
        if added.shard is not None:
            shards.append(added.shard.name)
            counts["samples"] += added.shard.rows
        counts["known"] += added.known
        counts.update(added.reasons)
        missing |= added.missing
    result = {"uri": file.uri, "shards": shards, "missing": sorted(missing)}
    config = {"version": VERSION, "pool": pool, "shard_samples": shard_samples}
    record = Record("ingest", entry, config, asdict(file), dict(counts), result)
    write_record(warehouse, _ledger_path(pool, entry), record)
    done = _ingested(record)
    logger.info("%s", done)
    return Outcome(done, cached=False)


def _added(writer: PoolWriter, file: SourceFile, shard_samples: int) -> Iterator[Added]:
    """Add a file's chunks in order: one is written while the next is examined and the one after that is read."""
    with ThreadPoolExecutor(1, "examine") as examining, ThreadPoolExecutor(1, "write") as writing:

        def begin(chunk: list[Row]) -> Future[Added]:
            examined = examining.submit(writer.examine, chunk, file.uri)
            return writing.submit(lambda: writer.add(examined.result()))

        begun: deque[Future[Added]] = deque()
        # map lets go of a chunk once it is handed over; a loop variable would hold it while the next is read
        for one in map(begin, _chunks(file, shard_samples)):
            begun.append(one)
            if len(begun) > 2:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()


def _chunks(file: SourceFile, shard_samples: int) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in read_rows(file):
        chunk.append(row)
        size += len(row.data or b"")
        if len(chunk) >= shard_samples or size >= SHARD_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _ledger_path(pool: str, entry: str) -> str:
    return f"ledgers/{pool}/{entry}.json"


def _ledger_entry(file: SourceFile, pool: str, warehouse: Warehouse, shard_samples: int) -> IngestedFile | str:
    """Return what the ledger says of an unchanged file, or the name of the entry to write when it has been read."""
    found: list[str] = []
    while True:
        entry = fingerprint([VERSION, file, shard_samples, found])
        record = read_record(warehouse, _ledger_path(pool, entry))
        if record is None or not file.version:
            return entry
        if not all(warehouse.exists(ShardRef(pool, name, 0).path) for name in record.result["shards"]):
            return entry
        appeared = [path for path in record.result["missing"] if image_is_there(path)]
        if not appeared:
            return _ingested(record)
        found += appeared


def _ingested(record: Record) -> IngestedFile:
    counts = dict(record.counts)
    samples, known = counts.pop("samples"), counts.pop("known")
    return IngestedFile(record.result["uri"], tuple(record.result["shards"]), samples, known, sum(counts.values()))
