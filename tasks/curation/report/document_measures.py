"""What a report on documents is made of: decisions on documents, texts and images, with the measurements shown."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.refs import DocumentShardRef, ShardRef, SignalRef, TextSignalRef
from storage.snapshot import Manifest
from storage.warehouse import Warehouse
from tasks.curation.conditions import locked_connection
from tasks.curation.interleaved.document_columns import COUNTS
from tasks.curation.interleaved.policy import UNMATCHED, DocumentPolicy
from tasks.curation.interleaved.texts import read_texts
from tasks.curation.report.measured import Comparisons, Measure, Measured, measure_samples

TEXTS = "texts."
"""What the names of text signals begin with in a manifest."""

OF_IMAGES = ["sample_id", "kept", "failed", "duplicate_of", "duplicate_rule", "similarity"]


@dataclass(frozen=True)
class MeasuredDocuments:
    """All documents, texts and images of a snapshot, each in the order of its decision tables.

    `documents` has the columns of `DOCUMENT_DECISIONS`, the signals of the whole text, and `shard`, the document's
    place in `shards`; `texts` has document_id, position, kept, failed and `shard`; `images` those that are there,
    decided on as samples, with the similarity to their text. `nodes` is where the decisions on the segments of each
    shard lie.
    """

    shards: tuple[DocumentShardRef, ...]
    nodes: tuple[str, ...]
    documents: pa.Table
    of_documents: tuple[Measure, ...]
    texts: pa.Table
    of_texts: tuple[Measure, ...]
    images: Measured


def read_documents(manifest: Manifest, *, warehouse: Warehouse) -> MeasuredDocuments:
    """Read a snapshot's decisions, and evaluate what its conditions compare with numbers."""
    policy = DocumentPolicy.model_validate(manifest.policy)
    shards = tuple(DocumentShardRef(manifest.pool, entry.pool_shard, entry.rows) for entry in manifest.node_decisions)
    nodes = [warehouse.read_table(entry.path) for entry in manifest.node_decisions]
    documents, of_documents = _documents(policy, manifest, warehouse)
    texts, of_texts = _texts(policy, shards, nodes, manifest.signals, warehouse)
    return MeasuredDocuments(
        shards,
        tuple(entry.path for entry in manifest.node_decisions),
        documents,
        of_documents,
        texts,
        of_texts,
        _images(policy, shards, nodes, manifest.signals, warehouse),
    )


def _documents(
    policy: DocumentPolicy, manifest: Manifest, warehouse: Warehouse
) -> tuple[pa.Table, tuple[Measure, ...]]:
    """The documents and what the policy compares with numbers; counts of segments that it does not compare follow."""
    tables = [warehouse.read_table(entry.path) for entry in manifest.document_decisions]
    rows = pa.concat_tables(_with_shard(tables))
    with locked_connection() as connection:
        compared = Comparisons(connection, policy.documents, policy.parameters, _scalars(rows.schema))
        measures = compared.measures(compared.numbers(rows), rows["failed"])
    known = {measure.sql for measure in measures}
    more = [name for name in COUNTS.names if name not in known]
    return rows, measures + tuple(Measure(name, _floats(rows[name]), (), ()) for name in more)


def _texts(
    policy: DocumentPolicy,
    shards: tuple[DocumentShardRef, ...],
    nodes: list[pa.Table],
    signals: Mapping[str, str],
    warehouse: Warehouse,
) -> tuple[pa.Table, tuple[Measure, ...]]:
    """The texts and what the policy compares with numbers; one shard's texts in memory at a time."""
    refs = [TextSignalRef(name.removeprefix(TEXTS), of) for name, of in signals.items() if name.startswith(TEXTS)]
    columns = ["document_id", "position", "kept", "failed"]
    decided = pa.concat_tables(_with_shard([_of_kind(table, "text").select(columns) for table in nodes]))
    numbers = []
    with locked_connection() as connection:
        for shard in shards:
            rows = read_texts(shard, refs, warehouse=warehouse)
            compared = Comparisons(connection, policy.texts, policy.parameters, _scalars(rows.schema))
            numbers.append(compared.numbers(rows))
    return decided, compared.measures(np.concatenate(numbers), decided["failed"])


def _images(
    policy: DocumentPolicy,
    shards: tuple[DocumentShardRef, ...],
    nodes: list[pa.Table],
    signals: Mapping[str, str],
    warehouse: Warehouse,
) -> Measured:
    """The images that are there, and what the policy compares with numbers: similarity to their text as well."""
    images = [table.filter(table["sample_id"].is_valid()).select(OF_IMAGES) for table in nodes]
    parts = [(ShardRef(s.pool, s.name, len(own)), own) for s, own in zip(shards, images, strict=True) if len(own)]
    refs = [SignalRef(name, of) for name, of in signals.items() if not name.startswith(TEXTS)]
    decided = (own.append_column("duplicate_distance", pa.nulls(len(own), pa.float32())) for _, own in parts)
    found = measure_samples(policy.image_policy, tuple(shard for shard, _ in parts), decided, refs, warehouse=warehouse)
    if policy.order == "dom":
        return found
    lines = () if policy.least_similarity is None else (policy.least_similarity,)
    similarity = Measure("similarity", _floats(found.samples["similarity"]), lines, (UNMATCHED,))
    return replace(found, measures=(*found.measures, similarity))


def _of_kind(nodes: pa.Table, kind: str) -> pa.Table:
    return nodes.filter(pc.equal(nodes["kind"], kind))


def _scalars(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field for field in schema if not pa.types.is_nested(field.type)])


def _with_shard(tables: list[pa.Table]) -> list[pa.Table]:
    return [
        table.append_column("shard", pa.repeat(pa.scalar(at, pa.int32()), len(table)))
        for at, table in enumerate(tables)
    ]


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()), np.float64)
