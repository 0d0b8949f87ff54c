"""What a report is made of: every sample of a snapshot with its decision and the measurements that are shown."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.refs import PoolRef, ShardRef, SignalRef
from storage.snapshot import Manifest
from storage.warehouse import Warehouse
from tasks.curation.columns import find_columns
from tasks.curation.conditions import Expression, PolicyError, Value, check_expression, evaluate, locked_connection
from tasks.curation.policy import SAMPLE_COLUMNS, AnyCondition, Policy, TopFraction
from tasks.curation.report.thresholds import thresholds

BREAKDOWNS = ("language", "format", "width", "height")
"""Columns that breakdowns need, where the signals have them."""


@dataclass(frozen=True)
class Measure:
    """A number that conditions judge rows by: its values (NaN for none), the lines they draw, and their names."""

    sql: str
    values: NDArray[np.float64]
    lines: tuple[float, ...]
    conditions: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """All samples of a snapshot, in the order of its decision tables.

    `samples` has the columns of `DECISIONS`, those of `BREAKDOWNS` that were measured, and where each sample lies:
    `shard`, its place in `shards`, and `row` in that shard.
    """

    shards: tuple[ShardRef, ...]
    samples: pa.Table
    measures: tuple[Measure, ...]


@dataclass
class _Judged:
    """A measure while the policy is read: its expression, its lines and the conditions that draw them."""

    expression: Expression
    lines: set[float] = field(default_factory=set)
    conditions: list[str] = field(default_factory=list)
    ranked_by: list[str] = field(default_factory=list)


class Comparisons:
    """What conditions compare with numbers, each once, in the order they name it; they may read `offered`."""

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        conditions: Sequence[AnyCondition],
        parameters: Mapping[str, Value],
        offered: pa.Schema,
    ) -> None:
        self._connection, self._parameters = connection, parameters
        self._judged = _judged(connection, conditions, parameters, offered)
        self.columns = frozenset(name for judge in self._judged for name in judge.expression.columns)

    def numbers(self, rows: pa.Table) -> NDArray[np.float64]:
        """Return the measures of some rows, shape (rows, measures); NaN for NULL."""
        if not self._judged:
            return np.empty((len(rows), 0))
        expressions = [judge.expression for judge in self._judged]
        found = evaluate(self._connection, expressions, rows, parameters=self._parameters)
        return np.stack([np.asarray(column.cast(pa.float64()), np.float64) for column in found.columns], axis=1)

    def measures(self, numbers: NDArray[np.float64], failed: pa.ChunkedArray) -> tuple[Measure, ...]:
        """Return the measures of all rows, of which `failed` has the conditions that they fail."""
        return tuple(_measure(judge, numbers[:, at], failed) for at, judge in enumerate(self._judged))


def read_measured(manifest: Manifest, *, warehouse: Warehouse) -> Measured:
    """Read a snapshot's decisions, and evaluate what its conditions compare with numbers, shard by shard."""
    shards = tuple(ShardRef(manifest.pool, entry.pool_shard, entry.rows) for entry in manifest.decisions)
    decided = (warehouse.read_table(entry.path) for entry in manifest.decisions)
    signals = [SignalRef(name, fingerprint) for name, fingerprint in manifest.signals.items()]
    return measure_samples(Policy.model_validate(manifest.policy), shards, decided, signals, warehouse=warehouse)


def measure_samples(
    policy: Policy,
    shards: tuple[ShardRef, ...],
    decided: Iterable[pa.Table],
    signals: Sequence[SignalRef],
    *,
    warehouse: Warehouse,
) -> Measured:
    """Evaluate what a policy's conditions compare with numbers; `decided` has the decisions on each of the shards."""
    columns = find_columns(PoolRef(shards[0].pool, shards), signals, warehouse=warehouse)
    shown = [name for name in BREAKDOWNS if name in columns.schema.names]
    tables, values = [], []
    with locked_connection() as connection:
        offered = pa.schema([*columns.schema, *SAMPLE_COLUMNS])
        compared = Comparisons(connection, policy.conditions, policy.parameters, offered)
        for at, (shard, decisions) in enumerate(zip(shards, decided, strict=True)):
            rows = columns.read(shard, {*shown, *compared.columns}, warehouse=warehouse)
            place = {"shard": np.full(len(rows), at, np.int32), "row": np.arange(len(rows), dtype=np.int32)}
            tables.append(_beside(decisions, {**{name: rows[name] for name in shown}, **place}))
            values.append(compared.numbers(rows))
    samples = pa.concat_tables(tables)
    return Measured(shards, samples, compared.measures(np.concatenate(values), samples["failed"]))


def _judged(
    connection: duckdb.DuckDBPyConnection,
    conditions: Sequence[AnyCondition],
    parameters: Mapping[str, Value],
    offered: pa.Schema,
) -> list[_Judged]:
    found: dict[str, _Judged] = {}
    for condition in conditions:
        if isinstance(condition, TopFraction):
            drawn: dict[str, set[float]] = {condition.of: set()}
        else:
            drawn = thresholds(connection, condition.sql, parameters)
        for sql, lines in drawn.items():
            try:
                expression = check_expression(connection, sql, what=sql, columns=offered, parameters=parameters)
            except PolicyError:
                continue  # a part of a condition that does not stand alone
            if expression.is_number:
                judge = found.setdefault(sql, _Judged(expression))
                judge.lines |= lines
                judge.conditions.append(condition.name)
                judge.ranked_by += [condition.name] if isinstance(condition, TopFraction) else []
    return list(found.values())


def _measure(judge: _Judged, values: NDArray[np.float64], failed: pa.ChunkedArray) -> Measure:
    lines = set(judge.lines)
    for name in judge.ranked_by:  # a top fraction's line is where the last sample that passed it stands
        passed = values[[name not in names for names in failed.to_pylist()]]
        lines |= {float(np.nanmin(passed))} if np.isfinite(passed).any() else set()
    return Measure(judge.expression.sql, values, tuple(sorted(lines)), tuple(judge.conditions))


def _beside(table: pa.Table, columns: dict[str, Iterable[object]]) -> pa.Table:
    for name, column in columns.items():
        table = table.append_column(name, column if isinstance(column, pa.ChunkedArray) else pa.array(column))
    return table
