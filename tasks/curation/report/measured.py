"""What a report is made of: every sample of a snapshot with its decision and the measurements that are shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.refs import PoolRef, ShardRef, SignalRef
from storage.snapshot import Manifest
from storage.warehouse import Warehouse
from tasks.curation.columns import find_columns
from tasks.curation.conditions import Expression, PolicyError, check_expression, evaluate, locked_connection
from tasks.curation.policy import SAMPLE_COLUMNS, Policy, TopFraction
from tasks.curation.report.thresholds import thresholds

BREAKDOWNS = ("language", "format", "width", "height")
"""Columns that breakdowns need, where the signals have them."""


@dataclass(frozen=True)
class Measure:
    """A number that conditions judge samples by: its values (NaN for none), the lines they draw, and their names."""

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


def read_measured(manifest: Manifest, *, warehouse: Warehouse) -> Measured:
    """Read a snapshot's decisions, and evaluate what its conditions compare with numbers, shard by shard."""
    policy = Policy.model_validate(manifest.policy)
    shards = tuple(ShardRef(manifest.pool, entry.pool_shard, entry.rows) for entry in manifest.decisions)
    signals = [SignalRef(name, fingerprint) for name, fingerprint in manifest.signals.items()]
    columns = find_columns(PoolRef(manifest.pool, shards), signals, warehouse=warehouse)
    shown = [name for name in BREAKDOWNS if name in columns.schema.names]
    tables, values = [], []
    with locked_connection() as connection:
        judged = _judged(policy, pa.schema([*columns.schema, *SAMPLE_COLUMNS]), connection)
        expressions = [judge.expression for judge in judged]
        needed = {*shown, *(name for expression in expressions for name in expression.columns)}
        for at, (shard, entry) in enumerate(zip(shards, manifest.decisions, strict=True)):
            rows = columns.read(shard, needed, warehouse=warehouse)
            place = {"shard": np.full(len(rows), at, np.int32), "row": np.arange(len(rows), dtype=np.int32)}
            decided = warehouse.read_table(entry.path)
            tables.append(_beside(decided, {**{name: rows[name] for name in shown}, **place}))
            values.append(_numbers(connection, expressions, rows, policy))
    samples = pa.concat_tables(tables)
    numbers = np.concatenate(values)
    measures = tuple(_measure(judge, numbers[:, at], samples) for at, judge in enumerate(judged))
    return Measured(shards, samples, measures)


def _judged(policy: Policy, offered: pa.Schema, connection: duckdb.DuckDBPyConnection) -> list[_Judged]:
    """The measures of a policy in the order its conditions name them, each once."""
    found: dict[str, _Judged] = {}
    for condition in policy.conditions:
        if isinstance(condition, TopFraction):
            drawn: dict[str, set[float]] = {condition.of: set()}
        else:
            drawn = thresholds(connection, condition.sql, policy.parameters)
        for sql, lines in drawn.items():
            try:
                expression = check_expression(connection, sql, what=sql, columns=offered, parameters=policy.parameters)
            except PolicyError:
                continue  # a part of a condition that does not stand alone
            if expression.is_number:
                judge = found.setdefault(sql, _Judged(expression))
                judge.lines |= lines
                judge.conditions.append(condition.name)
                judge.ranked_by += [condition.name] if isinstance(condition, TopFraction) else []
    return list(found.values())


def _numbers(
    connection: duckdb.DuckDBPyConnection, expressions: Sequence[Expression], rows: pa.Table, policy: Policy
) -> NDArray[np.float64]:
    """One column of floats an expression; NaN for NULL."""
    if not expressions:
        return np.empty((len(rows), 0))
    found = evaluate(connection, expressions, rows, parameters=policy.parameters)
    return np.stack([np.asarray(column.cast(pa.float64()), np.float64) for column in found.columns], axis=1)


def _measure(judge: _Judged, values: NDArray[np.float64], samples: pa.Table) -> Measure:
    lines = set(judge.lines)
    for name in judge.ranked_by:  # a top fraction's line is where the last sample that passed it stands
        passed = values[[name not in failed for failed in samples["failed"].to_pylist()]]
        lines |= {float(np.nanmin(passed))} if np.isfinite(passed).any() else set()
    return Measure(judge.expression.sql, values, tuple(sorted(lines)), tuple(judge.conditions))


def _beside(table: pa.Table, columns: dict[str, Iterable[object]]) -> pa.Table:
    for name, column in columns.items():
        table = table.append_column(name, column if isinstance(column, pa.ChunkedArray) else pa.array(column))
    return table
