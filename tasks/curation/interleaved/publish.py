"""Publishing documents: a decision becomes a numbered snapshot of self-contained interleaved shards.

The shards have OBELICS's shape, lists of images and texts of one length, so that whatever reads OBELICS reads them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.fingerprint import fingerprint
from storage.record import read_record
from storage.refs import (
    DecisionsRef,
    DocumentDecisionsRef,
    DocumentShardRef,
    DocumentsRef,
    Outcome,
    PairsRef,
    ShardRef,
    SignalRef,
    SnapshotRef,
)
from storage.schema import INTERLEAVED, PUBLISHED, SPLIT
from storage.snapshot import Draft, FileEntry, Manifest, commit
from storage.warehouse import Warehouse, check_name
from tasks.curation.columns import Columns, EvidenceError
from tasks.curation.duplicate_joins import Edges, Evidence
from tasks.curation.interleaved.decide import document_decisions_ref
from tasks.curation.interleaved.policy import DocumentPolicy
from tasks.curation.interleaved.texts import text_columns, text_refs
from tasks.curation.policy import SPLIT_CONFLICT
from tasks.curation.publish import split_counts
from tasks.curation.signals.contract import Signal
from tasks.curation.snapshot_files import SnapshotFiles, digest_rows
from tasks.curation.splits import assign_splits

VERSION = 1
EQUAL_IN = ("key", "text_digest")
"""Documents that are equal in one of these are never in two splits."""


@dataclass(frozen=True)
class Judged:
    """All that documents were decided on, and the decisions."""

    documents: DocumentsRef
    policy: DocumentPolicy
    images: DecisionsRef
    signals: tuple[SignalRef, ...]
    texts: tuple[Signal, ...]
    decisions: DocumentDecisionsRef


def publish_documents(
    dataset: str, judged: Judged, pairs: Sequence[PairsRef], *, warehouse: Warehouse
) -> Outcome[SnapshotRef]:
    """Publish the documents that were kept as the next snapshot of `dataset`; cached if the latest one is the same.

    Each has its images' original bytes and its texts in the order decided, its split and its whole text's signals.
    Documents of one key or one text share a split; one that would have to change it is left out, as `split_conflict`.
    Documents are not grouped by the images they share. `pairs` are those that the images' duplicates come from.
    Raises `EvidenceError` if the decisions were not made from these inputs.
    """
    check_name(dataset, "dataset")
    record = read_record(warehouse, judged.decisions.record)
    expected = document_decisions_ref(judged.documents, judged.policy, judged.images, judged.signals, judged.texts)
    if record is None or judged.decisions != expected:
        raise EvidenceError(
            f"{judged.decisions.folder} does not hold the decisions of policy {judged.policy.name} on these documents. "
            "Call decide_documents with the same inputs first."
        )
    shards = judged.documents.shards
    decided = [warehouse.read_table(judged.decisions.documents(shard)) for shard in shards]
    every = pa.concat_tables(decided)
    kept_ids = every["document_id"].filter(every["kept"])
    evidence = _equal_documents(judged.documents, warehouse)

    def build(parent: Manifest | None) -> Draft:
        earlier = [parent.published.path] if parent and parent.published else []
        published = warehouse.read_tables(earlier, PUBLISHED).cast(PUBLISHED)
        split = assign_splits(kept_ids, evidence=evidence, published=published, splits=judged.policy.splits)
        known = {entry.path: entry for entry in parent.files} if parent else {}
        files = _Files(judged, SnapshotFiles(dataset, Columns({}), known, warehouse), warehouse)
        parts = list(_with_splits(decided, split))
        with_rows = [(shard, part) for shard, part in zip(shards, parts, strict=True) if pc.any(part["kept"]).as_py()]
        return Draft(
            pool=judged.documents.images.name,
            pool_shards=tuple(shard.name for shard in shards),
            policy=judged.policy.model_dump(mode="json"),
            signals={
                **{signal.signal: signal.fingerprint for signal in judged.signals},
                **{f"texts.{signal.signal}": signal.fingerprint for signal in text_refs(judged.texts)},
            },
            pairs={pair.kind: pair.fingerprint for pair in pairs},
            decisions=(),
            curated=(),
            published=files.snapshot.write_published(published, pa.table([kept_ids, split], schema=PUBLISHED)),
            counts={**record.counts, **split_counts(split)},
            funnel=record.result,
            documents=tuple(files.write_documents(shard, part) for shard, part in with_rows),
            document_decisions=tuple(files.write_decisions(s, part) for s, part in zip(shards, parts, strict=True)),
            node_decisions=tuple(files.write_nodes(shard) for shard in shards),
        )

    with warehouse.locked(f"publish-{dataset}", shared=True):  # expiry must not remove files that this one shares
        return commit(warehouse, dataset, build)


def _equal_documents(documents: DocumentsRef, warehouse: Warehouse) -> Evidence:
    """Pairs of documents that are equal in one of `EQUAL_IN`, as stars around the first of each."""
    columns = ["document_id", *EQUAL_IN]
    rows = pa.concat_tables([warehouse.read_table(shard.path, columns) for shard in documents.shards])
    rows = rows.sort_by("document_id")
    ids = rows["document_id"].combine_chunks()
    kinds = {}
    for name in EQUAL_IN:
        codes = np.asarray(rows[name].combine_chunks().dictionary_encode().indices)
        _, first, group = np.unique(codes, return_index=True, return_inverse=True)
        left, right = first[group], np.arange(len(codes))
        is_pair = left != right
        distance = np.zeros(int(is_pair.sum()), np.float32)
        kinds[name] = Edges(left[is_pair].astype(np.int32), right[is_pair].astype(np.int32), distance)
    return Evidence(ids, kinds)


def _with_splits(decided: Sequence[pa.Table], split: pa.StringArray) -> Iterator[pa.Table]:
    """The decisions with the documents' splits; kept ones that have none are rejected for it."""
    begin = 0
    for table in decided:
        own = iter(split.slice(begin, kept := pc.sum(table["kept"]).as_py() or 0).to_pylist())
        begin += kept
        rows = [{**row, "split": next(own) if row["kept"] else None} for row in table.to_pylist()]
        for row in rows:
            if row["kept"] and row["split"] is None:
                row |= {"kept": False, "failed": [SPLIT_CONFLICT]}
        yield pa.Table.from_pylist(rows, pa.schema([*table.schema, PUBLISHED.field("split")]))


@dataclass(frozen=True)
class _Files:
    """Writes a snapshot's files on documents."""

    judged: Judged
    snapshot: SnapshotFiles
    warehouse: Warehouse

    def write_decisions(self, shard: DocumentShardRef, decided: pa.Table) -> FileEntry:
        """Write the decisions on one shard's documents."""
        table = decided.drop_columns("split")
        said = [pc.binary_join(table["failed"], ","), table["duplicate_of"], table["duplicate_rule"]]
        counts = [table[name].cast(pa.string()) for name in ("kept", "kept_texts", "kept_images")]
        identity = fingerprint([VERSION, shard.name, digest_rows(*said, *counts)])
        return self.snapshot.write(f"document_decisions/{identity}", lambda: table, shard.name)

    def write_nodes(self, shard: DocumentShardRef) -> FileEntry:
        """Write the decisions on one shard's segments."""
        table = self.warehouse.read_table(self.judged.decisions.nodes(shard))
        identity = fingerprint([VERSION, shard.name, _digest_nodes(table)])
        return self.snapshot.write(f"node_decisions/{identity}", lambda: table, shard.name)

    def write_documents(self, shard: DocumentShardRef, decided: pa.Table) -> FileEntry:
        """Write one shard's kept documents."""
        nodes = self.warehouse.read_table(self.judged.decisions.nodes(shard))
        kept = decided.filter(decided["kept"])
        split = kept.select(["document_id", "split"])
        texts = [[signal.signal, signal.fingerprint] for signal in text_refs(self.judged.texts)]
        identity = fingerprint([VERSION, shard.name, texts, digest_rows(*split.columns), _digest_nodes(nodes)])
        return self.snapshot.write(f"documents/{identity}", lambda: self._table(shard, kept, nodes), shard.name)

    def _table(self, shard: DocumentShardRef, kept: pa.Table, nodes: pa.Table) -> pa.Table:
        """The kept documents, with their text's signals; `kept` are the decisions on them, in the shard's order."""
        ids = kept["document_id"].combine_chunks()
        placed = nodes.filter(pc.and_(nodes["place"].is_valid(), pc.is_in(nodes["document_id"], ids)))
        by_document: dict[str, list[dict[str, Any]]] = {name: [] for name in ids.to_pylist()}
        for node in placed.sort_by("place").to_pylist():
            by_document[node["document_id"]].append(node)
        images = self._images(shard, placed["sample_id"])
        documents = self.warehouse.read_table(shard.path)
        documents = documents.filter(pc.is_in(documents["document_id"], ids))
        rows = [_published(row, by_document[row["document_id"]], images) for row in documents.to_pylist()]
        at = INTERLEAVED.get_field_index("split")
        table = pa.Table.from_pylist(rows, INTERLEAVED).set_column(at, SPLIT, kept["split"])
        for field in text_columns(self.judged.texts):
            table = table.append_column(field, kept[field.name])
        return table

    def _images(self, shard: DocumentShardRef, wanted: pa.ChunkedArray) -> dict[str, dict[str, Any]]:
        samples = ShardRef(shard.pool, shard.name, 0)
        if not self.warehouse.exists(samples.path):
            return {}
        table = self.warehouse.read_table(samples.path, ["sample_id", "image"])
        table = table.filter(pc.is_in(table["sample_id"], wanted.combine_chunks()))
        return {row["sample_id"]: row["image"] for row in table.to_pylist()}


def _published(
    document: dict[str, Any], nodes: list[dict[str, Any]], images: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """A row of `INTERLEAVED` but for its split."""
    row = {name: document[name] for name in ("document_id", "key", "source", "metadata")}
    return row | {
        "images": [images[node["sample_id"]] if node["kind"] == "image" else None for node in nodes],
        "texts": [document["segments"][node["position"]]["text"] for node in nodes],
        "nodes": [{name: node[name] for name in ("position", "sample_id", "similarity")} for node in nodes],
    }


def _digest_nodes(nodes: pa.Table) -> str:
    numbers = [nodes[name].cast(pa.string()) for name in ("place", "text_position", "similarity")]
    return digest_rows(*numbers, pc.binary_join(nodes["failed"], ","), nodes["duplicate_of"], nodes["duplicate_rule"])
