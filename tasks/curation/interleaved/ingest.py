"""Ingest of documents: texts and order into `documents`, images into the pool's shard of the same name.

As with samples, documents the pool holds are not added again, what can't be read goes to quarantine with its reason,
and a run killed at any moment is completed by running it again.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from storage import schema
from storage.fingerprint import canonical_json, fingerprint
from storage.pool import read_documents
from storage.record import Record, read_record, write_record
from storage.refs import DocumentShardRef, DocumentsRef, Outcome, ShardRef
from storage.warehouse import Warehouse, check_name
from tasks.curation.image_check import check_image
from tasks.curation.interleaved import sources
from tasks.curation.interleaved.sources import RawDocument, RawSegment, find_document_files
from tasks.curation.known_ids import KnownIds
from tasks.curation.pool_writer import PoolWriter, hash_of, sample_id
from tasks.curation.sources.contract import MAX_IMAGE_BYTES, Fault, Reason, RowError, SourceFile
from tasks.curation.sources.files import file_exists
from tasks.curation.sources.text import metadata_json, valid_text

VERSION = 1
SHARD_DOCUMENTS = 500
SHARD_BYTES = 128 * 2**20
"""Image bytes after which a shard ends early."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class IngestedDocuments:
    """What became of one source file: new shards and documents, documents known before, and faults by reason.

    A missing image counts as a fault of its reason, but leaves its document in the pool.
    """

    uri: str
    shards: tuple[str, ...]
    documents: int
    known: int
    faults: dict[str, int]


def ingest_documents(
    source: str,
    *,
    pool: str,
    warehouse: Warehouse,
    key_column: str | None = None,
    image_folder: str | None = None,
    shard_documents: int = SHARD_DOCUMENTS,
) -> Outcome[DocumentsRef]:
    """Add a source's new documents to a pool; returns all the pool then holds. See `find_document_files`.

    Cached means that no file of it has changed since it was ingested. Raises `SourceError` for a source that can't be
    read as asked and `WarehouseError` for a pool name that can't be used.
    """
    check_name(pool, "pool")
    files = find_document_files(source, key_column=key_column, image_folder=image_folder)
    outcomes = [
        ingest_document_file(file, pool=pool, warehouse=warehouse, shard_documents=shard_documents) for file in files
    ]
    return Outcome(read_documents(warehouse, pool), cached=all(outcome.cached for outcome in outcomes))


def ingest_document_file(
    file: SourceFile, *, pool: str, warehouse: Warehouse, shard_documents: int = SHARD_DOCUMENTS
) -> Outcome[IngestedDocuments]:
    """Add one source file's new documents to a pool, in chunks counted from its beginning.

    The file is read again if it changed, if one of its shards was deleted, or if an image file that was missing is
    there now: a document that got more images is another document, under the same key.
    """
    check_name(pool, "pool")
    entry = _ledger_entry(file, pool, warehouse, shard_documents)
    if isinstance(entry, IngestedDocuments):
        return Outcome(entry, cached=True)
    writer = _Writer(warehouse, pool, file.uri)
    for chunk in _chunks(file, shard_documents):
        writer.add(chunk)
    done = IngestedDocuments(file.uri, tuple(writer.shards), writer.documents, writer.known, dict(writer.faults))
    result = {**asdict(done), "missing": sorted(writer.missing)}
    config = {"version": VERSION, "pool": pool, "shard_documents": shard_documents}
    write_record(warehouse, _ledger(pool, entry), Record("ingest documents", entry, config, asdict(file), {}, result))
    logger.info("%s: %d new documents, %d known, faults %s", file.uri, done.documents, done.known, done.faults)
    return Outcome(done, cached=False)


def _chunks(file: SourceFile, shard_documents: int) -> Iterator[list[sources.Row]]:
    chunk: list[sources.Row] = []
    size = 0
    for row in sources.read_documents(file):
        chunk.append(row)
        segments = row.segments if isinstance(row, RawDocument) else ()
        size += sum(len(segment.image) for segment in segments if isinstance(segment.image, bytes))
        if len(chunk) >= shard_documents or size >= SHARD_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _ledger(pool: str, entry: str) -> str:
    return f"ledgers/{pool}/{entry}.json"


def _ledger_entry(file: SourceFile, pool: str, warehouse: Warehouse, size: int) -> IngestedDocuments | str:
    """Return what the ledger says of an unchanged file, or the name of the entry to write when it has been read."""
    found: list[str] = []
    while True:
        entry = fingerprint(["documents", VERSION, file, size, found])
        record = read_record(warehouse, _ledger(pool, entry))
        if record is None or not file.version:
            return entry
        result = dict(record.result)
        missing = result.pop("missing")
        if not all(warehouse.exists(DocumentShardRef(pool, name, 0).path) for name in result["shards"]):
            return entry
        appeared = [path for path in missing if file_exists(path)]
        if not appeared:
            return IngestedDocuments(**{**result, "shards": tuple(result["shards"])})
        found += appeared


class _Writer:
    """Writes the documents of one source file, and counts."""

    def __init__(self, warehouse: Warehouse, pool: str, path: str) -> None:
        self.warehouse, self.pool, self.path = warehouse, pool, valid_text(path)
        self.samples = PoolWriter.for_pool(warehouse, pool)
        self.held = KnownIds(warehouse, f"documents/{pool}", "document_id")
        self.shards: list[str] = []
        self.documents = self.known = 0
        self.faults: Counter[str] = Counter()
        self.missing: set[str] = set()

    def add(self, rows: Iterable[sources.Row]) -> None:
        """Add the documents that the pool lacks, their images first, and put faults into quarantine."""
        new: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        faults: list[Fault] = []
        self.held.refresh()
        for row in rows:
            if isinstance(row, Fault):
                faults.append(row)
                continue
            try:
                document, images, unread = _read(row, self.path)
            except RowError as error:
                faults.append(Fault.of(error, key=row.key, member=row.member))
                continue
            faults += unread
            if document["document_id"] in new or document["document_id"] in self.held:
                self.known += 1
            else:
                new[document["document_id"]] = (document, images)
        self.samples.write_faults(faults, self.path)
        self.faults.update(fault.reason.value for fault in faults)
        self.missing |= {fault.missing_path for fault in faults if fault.missing_path is not None}
        self._write(new)

    def _write(self, new: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
        with self.samples.alone():
            self.held.refresh()
            left = {name: row for name, row in new.items() if name not in self.held}
            self.known += len(new) - len(left)
            if not left:
                return
            documents = [document for document, _ in left.values()]
            images = [image for _, of_document in left.values() for image in of_document]
            shard = DocumentShardRef(self.pool, hash_of(map(canonical_json, documents)), len(documents))
            if images:
                samples = ShardRef(self.pool, shard.name, len(images))
                self.warehouse.write_table(samples.path, pa.Table.from_pylist(images, schema.SAMPLES))
            self.warehouse.write_table(shard.path, pa.Table.from_pylist(documents, schema.DOCUMENTS))
            self.held.add(f"{shard.name}.parquet", left)
        self.shards.append(shard.name)
        self.documents += shard.rows


def _read(raw: RawDocument, path: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[Fault]]:
    """Return the document, its images as samples, and the faults of those that are missing."""
    checked = [_checked(segment) for segment in raw.segments]
    content = [[s.text, _digest(s.image), s.url and valid_text(s.url), _reason(s.image)] for s in checked]
    texts = [segment.text for segment in checked if segment.text is not None]
    key = valid_text(raw.key) if raw.key is not None else hash_of([canonical_json(content)])[:16]
    identifier = hash_of([key, canonical_json(content)])
    images: list[dict[str, Any]] = []
    faults: list[Fault] = []
    segments = []
    for at, (segment, given) in enumerate(zip(checked, raw.segments, strict=True)):
        member = f"{raw.member}, segment {at}"
        row = {"kind": "text" if segment.is_text else "image", "text": segment.text, "reason": _reason(segment.image)}
        if isinstance(segment.image, bytes):
            images.append(_sample(segment, segment.image, f"{identifier}#{at}", path, member))
            row["sample_id"] = images[-1]["sample_id"]
        elif isinstance(segment.image, RowError):
            data = given.image if isinstance(given.image, bytes) else None
            faults.append(Fault.of(segment.image, key=key, member=member, data=data))
        segments.append(row | {"url": segment.url and valid_text(segment.url)})
    document = {
        "document_id": identifier,
        "key": key,
        "segments": segments,
        "text_digest": hash_of(texts),
        "source": {"path": path, "member": valid_text(raw.member)},
        "metadata": metadata_json(raw.metadata),
    }
    return document, images, faults


def _checked(segment: RawSegment) -> RawSegment:
    """The segment with the error in place of an image that does not decode."""
    if not isinstance(segment.image, bytes):
        return segment
    try:
        if len(segment.image) > MAX_IMAGE_BYTES:
            raise RowError(Reason.TOO_LARGE, f"{len(segment.image):,} bytes, over {MAX_IMAGE_BYTES:,}")
        check_image(segment.image)
    except RowError as error:
        return RawSegment(None, error, segment.path, segment.url, segment.metadata)
    return segment


def _sample(segment: RawSegment, image: bytes, key: str, path: str, member: str) -> dict[str, Any]:
    return {
        "sample_id": sample_id(key, image, ""),
        "key": key,
        "image": {"bytes": image, "path": segment.path and valid_text(segment.path.rsplit("/", 1)[-1])},
        "caption": None,
        "url": segment.url and valid_text(segment.url),
        "source": {"path": path, "member": valid_text(member)},
        "metadata": metadata_json(segment.metadata),
    }


def _digest(image: bytes | RowError | None) -> str | None:
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else None


def _reason(image: bytes | RowError | None) -> str | None:
    return image.reason.value if isinstance(image, RowError) else None
