"""Expressions over all rows of a pool: each is evaluated once, whoever asks for it, few shards in memory at a time."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.refs import PoolRef, ShardRef
from storage.warehouse import Warehouse
from tasks.curation.columns import Columns
from tasks.curation.conditions import Expression, Value, check_expression, evaluate, locked_connection, refused_value
from tasks.curation.parallel import in_order
from tasks.curation.policy import SAMPLE_COLUMNS, CheckedPolicy

READERS = 8
"""Shards read at once: enough to hide an object store's delay, few enough to hold in memory."""
BLOCK_ROWS = 2**18
"""Rows evaluated at once: enough for DuckDB to use its threads."""


@dataclass(frozen=True)
class Bound:
    """A checked expression with values for its parameters; `origin` is whose it is. Equal if it gives equal values."""

    expression: Expression
    values: tuple[tuple[str, Value], ...]
    _written: str = field(repr=False)
    origin: str = field(compare=False)

    @classmethod
    def of(cls, expression: Expression, parameters: Mapping[str, Value], origin: str) -> "Bound":
        """Take from `parameters` what the expression reads."""
        values = tuple((name, parameters[name]) for name in sorted(expression.parameters))
        return cls(expression, values, repr(values), origin)  # 1 and 1.0 are equal, but not to DuckDB


def bind(checked: CheckedPolicy, expressions: Sequence[Expression]) -> list[Bound]:
    """Return expressions of a policy with its parameters' values."""
    return [Bound.of(one, checked.policy.parameters, checked.policy.origin) for one in expressions]


def check_grouping(by: str, columns: Columns) -> Bound:
    """Return a SQL expression to group samples by, as text. Raises `PolicyError` if it does not fit the columns."""
    offered = pa.schema([f for f in (*columns.schema, *SAMPLE_COLUMNS) if not pa.types.is_nested(f.type)])
    with locked_connection() as connection:
        checked = check_expression(connection, f"({by})::VARCHAR", what="by", columns=offered, parameters={})
    return Bound.of(checked, {}, "by")


def evaluate_pool(
    pool: PoolRef, columns: Columns, wanted: Collection[Bound], *, warehouse: Warehouse
) -> tuple[pa.ChunkedArray, dict[Bound, pa.ChunkedArray]]:
    """Return the ids of all samples of the pool, and the values of what is wanted, in the same order. NaN is NULL.

    Raises `PolicyError`, beginning with the origin, for an expression that meets a value it can't handle.
    """
    calls = _calls(wanted)
    names = {name for bound in wanted for name in bound.expression.columns}
    ids: list[pa.Array] = []
    values: dict[Bound, list[pa.Array]] = {bound: [] for call in calls for bound in call}
    with locked_connection() as connection:
        for rows in _blocks(pool, columns, names, warehouse):
            ids += rows["sample_id"].chunks
            for call in calls:
                for bound, found in zip(call, _evaluate(connection, call, rows).columns, strict=True):
                    values[bound] += found.chunks
    kinds = {bound: chunks[0].type for bound, chunks in values.items()}
    return pa.chunked_array(ids, pa.string()), {
        bound: pa.chunked_array(values[bound], kinds[bound]) for bound in values
    }


def _calls(wanted: Collection[Bound]) -> list[list[Bound]]:
    """Each once, together with those that don't mean another value by the same parameter."""
    calls: list[tuple[dict[str, str], list[Bound]]] = []
    for bound in dict.fromkeys(wanted):
        own = {name: repr(value) for name, value in bound.values}
        fits = (call for call in calls if all(call[0].get(name, text) == text for name, text in own.items()))
        known, members = next(fits, ({}, []))
        if not members:
            calls.append((known, members))
        known |= own
        members.append(bound)
    return [members for _, members in calls]


def _blocks(pool: PoolRef, columns: Columns, names: set[str], warehouse: Warehouse) -> Iterator[pa.Table]:
    """The pool's rows, whole shards at a time."""

    def read(shard: ShardRef) -> pa.Table:
        return columns.read(shard, names, warehouse=warehouse)

    waiting: list[pa.Table] = []
    for rows in in_order(read, pool.shards, threads=READERS):
        waiting.append(rows)
        if sum(map(len, waiting)) >= BLOCK_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _evaluate(connection: duckdb.DuckDBPyConnection, call: Sequence[Bound], rows: pa.Table) -> pa.Table:
    parameters = {name: value for bound in call for name, value in bound.values}
    read = {name for bound in call for name in bound.expression.columns}
    rows = rows.select(sorted(read) or ["sample_id"])
    try:
        return evaluate(connection, [bound.expression for bound in call], rows, parameters=parameters)
    except duckdb.Error:
        for bound in call:
            try:
                evaluate(connection, [bound.expression], rows, parameters=parameters)
            except duckdb.Error as error:
                raise refused_value(bound.origin, repr(bound.expression.sql), error) from None
        raise


def passes_condition(values: pa.ChunkedArray, fraction: float | None) -> NDArray[np.bool_]:
    """Return which samples pass, by a condition's values or, with a share of all, by the numbers to rank by."""
    if fraction is None:
        return np.asarray(pc.fill_null(values, False))
    # unsafe, as no double is equal to some 64-bit integers, such as hashes: the nearest one ranks as well
    return _in_top(np.asarray(values.cast(pa.float64(), safe=False), np.float64), fraction)


def _in_top(scores: NDArray[np.float64], fraction: float) -> NDArray[np.bool_]:
    """DataComp's rule: at least as good as place int(N·fraction) of all N; NaN stands for NULL and never passes."""
    valid = scores[~np.isnan(scores)]
    place = int(len(scores) * fraction)
    if place >= len(valid):
        return ~np.isnan(scores)
    threshold: np.float64 = -np.partition(-valid, place)[place]
    return np.asarray(scores >= threshold)
