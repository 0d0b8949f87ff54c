"""The signals' scalar columns side by side: which table each lies in, and the rows of a shard with those asked for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from storage.refs import PoolRef, ShardRef, SignalRef
from storage.schema import CURATED
from storage.warehouse import Warehouse


class EvidenceError(ValueError):
    """Signals or pairs don't fit the pool or each other; the message says which and what to do."""


@dataclass(frozen=True)
class Columns:
    """Scalar columns by signal, in the order given. Embeddings and other lists are left in their tables."""

    by_signal: Mapping[SignalRef, pa.Schema]

    @property
    def schema(self) -> pa.Schema:
        """All columns, signal after signal."""
        return pa.schema([field for schema in self.by_signal.values() for field in schema])

    def read(self, shard: ShardRef, names: Collection[str], *, warehouse: Warehouse) -> pa.Table:
        """Return `sample_id` and the named columns, of the signals or the samples themselves, in the shard's order.

        Raises `EvidenceError` if a table is missing or holds other samples than the shard.
        """
        own = [name for name in CURATED.names if name in names and name != "sample_id"]
        rows = warehouse.read_table(shard.path, ["sample_id", *own])
        for signal, schema in self.by_signal.items():
            wanted = [name for name in schema.names if name in names]
            if not wanted:
                continue
            measured = _read(signal, shard, ["sample_id", *wanted], warehouse)
            if not measured["sample_id"].equals(rows["sample_id"]):
                raise EvidenceError(
                    f"{signal.table(shard)} does not hold the samples of shard {shard.name} in their order. "
                    "Delete it and score the pool again."
                )
            for name in wanted:
                rows = rows.append_column(schema.field(name), measured[name])
        return rows


def find_columns(pool: PoolRef, signals: Sequence[SignalRef], *, warehouse: Warehouse) -> Columns:
    """Return the columns that `signals` hold for the pool.

    Raises `EvidenceError` if the pool is empty, was not scored, or two signals have a column of the same name.
    """
    if not pool.rows:
        raise EvidenceError(f"pool {pool.name} has no samples. Ingest a source into it first.")
    owner = dict.fromkeys(CURATED.names, "the samples themselves")
    by_signal = {}
    for signal in signals:
        table = _read(signal, pool.shards[0], None, warehouse).schema
        fields = [field for field in table if field.name != "sample_id" and not pa.types.is_nested(field.type)]
        for field in fields:
            if field.name in owner:
                raise EvidenceError(
                    f'column "{field.name}" is in signal {signal.signal} and in {owner[field.name]}. '
                    "Decide with one measurement of a kind."
                )
            owner[field.name] = f"signal {signal.signal}"
        by_signal[signal] = pa.schema(fields)
    return Columns(by_signal)


def _read(signal: SignalRef, shard: ShardRef, names: list[str] | None, warehouse: Warehouse) -> pa.Table:
    path = signal.table(shard)
    try:
        if names is not None:
            return warehouse.read_table(path, names)
        with warehouse.open_parquet(path) as parquet:
            return parquet.schema_arrow.empty_table()
    except FileNotFoundError:
        raise EvidenceError(
            f"{path} is missing: signal {signal.signal} was not measured for shard {shard.name} of pool {shard.pool}. "
            "Score the pool first."
        ) from None
