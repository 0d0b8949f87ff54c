"""Score: measures what a warehouse does not hold yet of some signals, for one shard, with one decode an image."""

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage import schema
from storage.record import Record, write_record
from storage.refs import Outcome, ShardRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation import batch
from tasks.curation.batch import Batch, Needs, read_batches
from tasks.curation.image_check import check_image
from tasks.curation.quarantine import quarantine_row
from tasks.curation.signals.contract import Signal
from tasks.curation.sources.contract import Fault, Reason, RowError

CAPTION_ROWS = 8_192
"""Samples in a batch for signals that look at no image."""

SOURCE_ROWS = 1_024
"""Samples in a batch for signals that are measured from another's columns: embeddings are some kilobytes each."""

Failure = tuple[bytes, Exception]
"""An image that can't be decoded, and why."""

_LIBRARIES = ("pillow", "simplejpeg", "scipy", "onnxruntime", "open_clip_torch", "torch", "opencv-python-headless")

logger = logging.getLogger(__name__)


def score_shard(
    shard: ShardRef, signals: Sequence[Signal], *, warehouse: Warehouse, threads: int | None = None
) -> list[Outcome[SignalRef]]:
    """Measure what `warehouse` does not hold yet of `signals` for one shard, decoding each image once.

    Returns one outcome per signal, in the order given; cached means that its table was there. The same shard gives
    the same bytes on one machine, whichever signals were missing. Images that can't be decoded get nulls and a row in
    quarantine. `threads` decode while the models run; by default one more than there are usable cores, as now and then
    one waits for the interpreter. Raises `MissingWeights` if a signal's model can't be found, before anything is
    measured, and `ValueError` if a signal's source is neither stored nor among `signals`.
    """
    refs = [signal.ref for signal in signals]
    missing = {ref: s for ref, s in zip(refs, signals, strict=True) if not warehouse.exists(ref.table(shard))}
    if missing:
        logger.info("shard %s/%s: measuring %s", shard.pool, shard.name, ", ".join(ref.signal for ref in missing))
        _measure(shard, missing, warehouse, threads or len(os.sched_getaffinity(0)) + 1)
    return [Outcome(ref, cached=ref not in missing) for ref in refs]


def _measure(shard: ShardRef, missing: Mapping[SignalRef, Signal], warehouse: Warehouse, threads: int) -> None:
    of_others = {ref: signal for ref, signal in missing.items() if signal.source is not None}
    of_samples = {ref: signal for ref, signal in missing.items() if signal.source is None}
    of_captions = {ref: signal for ref, signal in of_samples.items() if signal.needs is Needs.NOTHING}
    of_images = {ref: signal for ref, signal in of_samples.items() if signal.needs is not Needs.NOTHING}
    for signal in of_others.values():
        _check_source(shard, signal, of_samples, warehouse)
    with ThreadPoolExecutor(1, thread_name_prefix="captions") as beside:
        captions = beside.submit(_pass, shard, of_captions, warehouse, threads, CAPTION_ROWS)
        _pass(shard, of_images, warehouse, threads, batch.ROWS)
        captions.result()
    for ref, signal in of_others.items():
        _measure_from_source(shard, ref, signal, warehouse)


def _check_source(shard: ShardRef, signal: Signal, missing: Mapping[SignalRef, Signal], warehouse: Warehouse) -> None:
    source = _source(signal)
    if source not in missing and not warehouse.exists(source.table(shard)):
        raise ValueError(
            f"signal {signal.name} is measured from {source.signal}, which is not measured for shard {shard.name} of "
            f"pool {shard.pool}. Add {source.signal} with the same settings to the signals."
        )


def _source(signal: Signal) -> SignalRef:
    assert signal.source is not None
    return signal.source.ref


def _measure_from_source(shard: ShardRef, ref: SignalRef, signal: Signal, warehouse: Warehouse) -> None:
    """Write a signal's table from the stored one of its source, so that it is the same whenever it is measured."""
    source = warehouse.read_table(_source(signal).table(shard)).combine_chunks()
    rows = []
    for part in source.to_batches(max_chunksize=SOURCE_ROWS):
        samples = Batch(pa.nulls(len(part), pa.string()), measured=part.drop_columns("sample_id"))
        rows.append(_table_rows(signal, part.column("sample_id"), samples))
    _write(shard, ref, signal, rows, warehouse)


def _pass(shard: ShardRef, missing: Mapping[SignalRef, Signal], warehouse: Warehouse, threads: int, rows: int) -> None:
    """Read the shard once and write the table of every missing signal."""
    if not missing:
        return
    measured: dict[SignalRef, list[pa.RecordBatch]] = {ref: [] for ref in missing}
    failed: dict[str, Failure] = {}
    with warehouse.open_parquet(shard.path) as parquet:
        for read in read_batches(parquet, list(missing.values()), threads=threads, rows=rows):
            for ref, signal in missing.items():
                measured[ref].append(_table_rows(signal, read.sample_ids, read.for_signal(signal)))
            for row, error in read.errors.items():
                failed[read.sample_ids[row].as_py()] = (read.images[row] or b"", error)
    if failed and any(signal.needs is Needs.PIXELS for signal in missing.values()):
        _quarantine(shard, failed, warehouse)
    for ref, signal in missing.items():
        _write(shard, ref, signal, measured[ref], warehouse)


def _write(
    shard: ShardRef, ref: SignalRef, signal: Signal, rows: Sequence[pa.RecordBatch], warehouse: Warehouse
) -> None:
    _describe(ref, signal, warehouse)
    warehouse.write_table(ref.table(shard), pa.Table.from_batches(rows, _table_schema(signal)))


def _table_schema(signal: Signal) -> pa.Schema:
    return pa.schema([schema.SAMPLE_ID, *signal.columns])


def _table_rows(signal: Signal, sample_ids: pa.StringArray, samples: Batch) -> pa.RecordBatch:
    columns = signal.measure(samples)
    if columns.schema != signal.columns or columns.num_rows != len(sample_ids):
        raise TypeError(
            f"{type(signal).__name__}.measure returned {columns.num_rows} rows of\n{columns.schema}\nfor "
            f"{len(sample_ids)} samples of\n{signal.columns}\nReturn one row a sample with the signal's columns."
        )
    return pa.record_batch([sample_ids, *columns.columns], schema=_table_schema(signal))


def _describe(ref: SignalRef, signal: Signal, warehouse: Warehouse) -> None:
    """Write the record beside the tables, before the first of them; a record that is there stands."""
    path = f"{ref.folder}/signal.json"
    if not warehouse.exists(path):
        libraries = {name: version(name) for name in _LIBRARIES}
        result = {"first_measured_with": libraries}
        write_record(warehouse, path, Record("signal", ref.fingerprint, signal.config, {}, result=result))


def _quarantine(shard: ShardRef, failed: Mapping[str, Failure], warehouse: Warehouse) -> None:
    """Say which of a shard's images can't be decoded; the samples stay in the pool, with nulls."""
    logger.warning("shard %s/%s: can't decode %s", shard.pool, shard.name, ", ".join(failed))
    samples = warehouse.read_table(shard.path, ["sample_id", "key", "source"])
    rows = [
        quarantine_row(_fault(sample, *failed[sample["sample_id"]]), sample["source"]["path"])
        for sample in samples.filter(pc.is_in(samples["sample_id"], pa.array(list(failed)))).to_pylist()
    ]
    path = f"quarantine/{shard.pool}/undecodable-{shard.name}.parquet"
    warehouse.write_table(path, pa.Table.from_pylist(rows, schema.QUARANTINE))


def _fault(sample: Mapping[str, Any], data: bytes, error: Exception) -> Fault:
    try:
        check_image(data)
        found = RowError(Reason.CORRUPT, f"{type(error).__name__}: {error}")
    except RowError as damage:
        found = damage
    return Fault.of(found, key=sample["key"], member=sample["source"]["member"], data=data)
