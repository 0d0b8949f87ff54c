"""Text signals of documents: what the signals on captions say of each text segment, and of a document's whole text."""

from collections.abc import Sequence

import pyarrow as pa

from storage import schema
from storage.record import Record, write_record
from storage.refs import DocumentShardRef, Outcome, TextSignalRef
from storage.warehouse import Warehouse
from tasks.curation.batch import Batch, Needs
from tasks.curation.columns import EvidenceError
from tasks.curation.signals.contract import Signal

SEPARATOR = "\n\n"
"""What stands between the segments of a whole text."""

PLACE = pa.schema(
    [schema.DOCUMENT_ID, schema.column("position", pa.int32(), "the segment's position; null for the whole text")]
)


def is_text_signal(signal: Signal) -> bool:
    """Whether a signal looks at captions alone, so that it can look at any text."""
    return signal.needs is Needs.NOTHING and signal.source is None


def measure_texts(
    shard: DocumentShardRef, signals: Sequence[Signal], *, warehouse: Warehouse
) -> list[Outcome[TextSignalRef]]:
    """Measure what `warehouse` does not hold yet of text signals for one shard, one reference a signal, in order.

    The columns are the signals' own, so `caption_words` counts the words of a segment, or of all segments together.
    """
    refs = [TextSignalRef(signal.name, signal.ref.fingerprint) for signal in signals]
    missing = {ref: s for ref, s in zip(refs, signals, strict=True) if not warehouse.exists(ref.table(shard))}
    if missing:
        places, texts = _texts(warehouse.read_table(shard.path, ["document_id", "segments"]))
        for ref, signal in missing.items():
            write_record(
                warehouse, f"{ref.folder}/signal.json", Record("text signal", ref.fingerprint, signal.config, {})
            )
            measured = signal.measure(Batch(texts))
            table = pa.table([*places.columns, *measured.columns], pa.schema([*PLACE, *signal.columns]))
            warehouse.write_table(ref.table(shard), table)
    return [Outcome(ref, cached=ref not in missing) for ref in refs]


def read_texts(shard: DocumentShardRef, signals: Sequence[TextSignalRef], *, warehouse: Warehouse) -> pa.Table:
    """Return document_id, position and the columns of all signals, a row a segment and whole text.

    Raises `EvidenceError` if a signal was not measured for the shard, or two have a column of the same name.
    """
    table = _texts(warehouse.read_table(shard.path, ["document_id", "segments"]))[0]
    for signal in signals:
        if not warehouse.exists(signal.table(shard)):
            raise EvidenceError(
                f"{signal.table(shard)} is missing: signal {signal.signal} was not measured for the texts of shard "
                f"{shard.name} of pool {shard.pool}. Measure its texts first."
            )
        measured = warehouse.read_table(signal.table(shard))
        if not measured.select(PLACE.names).equals(table.select(PLACE.names)):
            raise EvidenceError(
                f"{signal.table(shard)} does not hold the texts of its shard. Delete it, measure again."
            )
        for name in measured.column_names[len(PLACE) :]:
            if name in table.column_names:
                raise EvidenceError(f'column "{name}" is measured twice. Decide with one measurement of a kind.')
            table = table.append_column(measured.schema.field(name), measured[name])
    return table


def _texts(documents: pa.Table) -> tuple[pa.Table, pa.StringArray]:
    """Where each text stands, document after document, its whole text last; and the texts."""
    ids: list[str] = []
    positions: list[int | None] = []
    texts: list[str] = []
    for row in documents.to_pylist():
        found = [(at, segment["text"]) for at, segment in enumerate(row["segments"]) if segment["kind"] == "text"]
        ids += [row["document_id"]] * (len(found) + 1)
        positions += [*(at for at, _ in found), None]
        texts += [*(text for _, text in found), SEPARATOR.join(text for _, text in found)]
    return pa.table([ids, positions], PLACE), pa.array(texts, pa.string())
