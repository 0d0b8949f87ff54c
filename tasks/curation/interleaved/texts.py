"""Text signals of documents: what signals on captions say of each text segment, and of what stays of a document.

The columns are the signals' own, so `caption_words` counts the words of a segment, or of a document's whole text.
"""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from storage import schema
from storage.fingerprint import fingerprint
from storage.record import Record, write_record
from storage.refs import DocumentShardRef, Outcome, TextSignalRef
from storage.warehouse import Warehouse
from tasks.curation.batch import Batch, Needs
from tasks.curation.columns import EvidenceError
from tasks.curation.signals.contract import Signal
from tasks.curation.snapshot_files import digest_rows

SEPARATOR = "\n\n"
"""What stands between the segments of a whole text."""

PLACE = pa.schema([schema.DOCUMENT_ID, schema.column("position", pa.int32(), "the segment's position")])


def is_text_signal(signal: Signal) -> bool:
    """Whether a signal looks at captions alone, so that it can look at any text."""
    return signal.needs is Needs.NOTHING and signal.source is None


def text_refs(signals: Sequence[Signal]) -> list[TextSignalRef]:
    """Return where the tables of text signals lie."""
    return [TextSignalRef(signal.name, signal.ref.fingerprint) for signal in signals]


def text_columns(signals: Sequence[Signal]) -> pa.Schema:
    """Return the columns of all signals. Raises `EvidenceError` if two have one of the same name."""
    columns = [column for signal in signals for column in signal.columns]
    if twice := {column.name for column in columns if [c.name for c in columns].count(column.name) > 1}:
        raise EvidenceError(f"columns {', '.join(sorted(twice))} are measured twice. Use one measurement of a kind.")
    return pa.schema(columns)


def measure_texts(
    shard: DocumentShardRef, signals: Sequence[Signal], *, warehouse: Warehouse
) -> list[Outcome[TextSignalRef]]:
    """Measure what `warehouse` does not hold yet of text signals for each text segment of one shard.

    Returns one reference a signal, in order.
    """
    refs = text_refs(signals)
    missing = {ref: s for ref, s in zip(refs, signals, strict=True) if not warehouse.exists(ref.table(shard))}
    if missing:
        segments = read_segments(shard, warehouse=warehouse)
        for ref, signal in missing.items():
            _describe(ref, signal, warehouse)
            table = _measured(signal, segments["text"], segments.select(PLACE.names))
            warehouse.write_table(ref.table(shard), table)
    return [Outcome(ref, cached=ref not in missing) for ref in refs]


def read_texts(shard: DocumentShardRef, refs: Sequence[TextSignalRef], *, warehouse: Warehouse) -> pa.Table:
    """Return document_id, position, text and the columns of all text signals, a row a text segment in order.

    Raises `EvidenceError` if a signal was not measured for the shard.
    """
    table = read_segments(shard, warehouse=warehouse)
    for ref in refs:
        if not warehouse.exists(ref.table(shard)):
            raise EvidenceError(
                f"{ref.table(shard)} is missing: signal {ref.signal} was not measured for the texts of shard "
                f"{shard.name} of pool {shard.pool}. Measure its texts first."
            )
        measured = warehouse.read_table(ref.table(shard))
        for field in list(measured.schema)[len(PLACE) :]:
            table = table.append_column(field, measured[field.name])
    return table


def measure_whole(
    shard: DocumentShardRef, nodes: pa.Table, signals: Sequence[Signal], *, warehouse: Warehouse
) -> pa.Table:
    """Return document_id and the columns of all signals for what stays of each document's text, in the shard's order.

    `nodes` are the shard's rows of `NODE_DECISIONS`; texts that stay are joined by `SEPARATOR`, in the source's order.
    What was measured for the same texts before is read.
    """
    ids = warehouse.read_table(shard.path, ["document_id"])["document_id"]
    kept = nodes.filter(pc.and_(nodes["kept"], pc.equal(nodes["kind"], "text")))
    identity = fingerprint([shard.name, digest_rows(kept["document_id"], kept["position"].cast(pa.string()))])
    texts: list[str] | None = None
    table = pa.table({"document_id": ids})
    for ref, signal in zip(text_refs(signals), signals, strict=True):
        path = f"{ref.folder}/documents/{identity}.parquet"
        if not warehouse.exists(path):
            texts = texts if texts is not None else _whole(ids, kept, read_segments(shard, warehouse=warehouse))
            warehouse.write_table(path, _measured(signal, pa.array(texts, pa.string()), pa.table({"document_id": ids})))
        measured = warehouse.read_table(path)
        for field in list(measured.schema)[1:]:
            table = table.append_column(field, measured[field.name])
    return table


def read_segments(shard: DocumentShardRef, *, warehouse: Warehouse) -> pa.Table:
    """Return document_id, position and text of each text segment of a shard, in order."""
    rows = [
        {"document_id": row["document_id"], "position": at, "text": segment["text"]}
        for row in warehouse.read_table(shard.path, ["document_id", "segments"]).to_pylist()
        for at, segment in enumerate(row["segments"])
        if segment["kind"] == "text"
    ]
    return pa.Table.from_pylist(rows, pa.schema([*PLACE, pa.field("text", pa.string())]))


def _measured(signal: Signal, texts: pa.Array | pa.ChunkedArray, beside: pa.Table) -> pa.Table:
    captions = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    columns = signal.measure(Batch(captions))
    return pa.table([*beside.columns, *columns.columns], pa.schema([*beside.schema, *signal.columns]))


def _whole(ids: pa.ChunkedArray, kept: pa.Table, segments: pa.Table) -> list[str]:
    stays = set(zip(kept["document_id"].to_pylist(), kept["position"].to_pylist(), strict=True))
    parts: dict[str, list[str]] = {name: [] for name in ids.to_pylist()}
    for segment in segments.to_pylist():
        if (segment["document_id"], segment["position"]) in stays:
            parts[segment["document_id"]].append(segment["text"])
    return [SEPARATOR.join(own) for own in parts.values()]


def _describe(ref: TextSignalRef, signal: Signal, warehouse: Warehouse) -> None:
    write_record(warehouse, f"{ref.folder}/signal.json", Record("text signal", ref.fingerprint, signal.config, {}))
