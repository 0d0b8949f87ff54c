"""What if: one threshold at many values, or two policies side by side, over evidence that is there already.

A sweep evaluates the conditions that use the parameter, and nothing else, again for each value; a comparison decides
by both policies and asks their decisions.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.refs import DecisionsRef, PairsRef, PoolRef, ShardRef, SignalRef
from storage.schema import DECISIONS, column
from storage.warehouse import Warehouse
from tasks.curation.columns import Columns, find_columns
from tasks.curation.conditions import Expression, PolicyError, check_expression, evaluate, locked_connection
from tasks.curation.decide import READERS, decide, in_top
from tasks.curation.funnel import cell, count_overlap
from tasks.curation.parallel import in_order
from tasks.curation.policy import SAMPLE_COLUMNS, CheckedPolicy, Policy, TopFraction

SWEEP = pa.schema(
    [
        column("value", pa.float64(), "the parameter's value"),
        column("group", pa.string(), "the samples' value of `by`; null for all samples"),
        column("samples", pa.int64(), "samples in the group"),
        column("passing", pa.int64(), "those that pass every condition, before duplicates"),
        column("fails", pa.int64(), "those that fail a condition that uses the parameter"),
        column("fails_alone", pa.int64(), "those that fail no other condition"),
    ]
)


def sweep(
    pool: PoolRef,
    policy: Policy,
    parameter: str,
    values: Sequence[float],
    signals: Sequence[SignalRef],
    *,
    warehouse: Warehouse,
    by: str | None = None,
) -> pa.Table:
    """Return what every value of a policy's parameter would let pass, as rows of `SWEEP`.

    With `by`, a SQL expression such as `language` or `split_part(url, '/', 3)`, there is a row for each of its values
    too. Duplicates are not looked at: `compare` does. Raises `PolicyError` if no condition uses the parameter, or a
    value or `by` does not fit.
    """
    columns = find_columns(pool, signals, warehouse=warehouse)
    checked = policy.check(columns.schema)
    used = [at for at, one in enumerate(policy.conditions) if _uses(one, checked.conditions[at], parameter)]
    trials = [_with_value(checked, parameter, value, columns) for value in values]
    if not used:
        raise PolicyError(f"{policy.origin}: no condition uses ${parameter}, so there is nothing to sweep.")
    with locked_connection() as connection:
        offered = pa.schema([*columns.schema, *SAMPLE_COLUMNS])
        grouping = _grouping(connection, by, offered)
        rows = _read(pool, columns, checked, grouping, warehouse)
        groups, names = _groups(connection, grouping, rows)
        others = [at for at in range(len(policy.conditions)) if at not in used]
        passes_others = _passes(connection, checked, others, rows)
        parts = []
        for value, trial in zip(values, trials, strict=True):
            passes = _passes(connection, trial, used, rows)
            counts = [
                _count(groups, names, mask)
                for mask in (np.ones(len(rows), bool), passes & passes_others, ~passes, ~passes & passes_others)
            ]
            parts += [(float(value), name, *row) for name, *row in zip([None, *names], *counts, strict=True)]
    return pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(zip(*parts, strict=True), SWEEP, strict=True)], schema=SWEEP
    )


@dataclass(frozen=True)
class Comparison:
    """Two policies on one pool: samples kept by both, one or none, and why.

    `only_a` and `only_b` map the reasons that the other policy gives to the number of samples it rejects for them;
    `overlap_a` and `overlap_b` map a pair of conditions to the samples that fail both, of equal names to those that
    fail this one alone; `groups` are rows of (group, samples, kept by a, kept by b).
    """

    samples: int
    both: int
    only_a: dict[tuple[str, ...], int]
    only_b: dict[tuple[str, ...], int]
    overlap_a: dict[tuple[str, str], int]
    overlap_b: dict[tuple[str, str], int]
    groups: tuple[tuple[str | None, int, int, int], ...]

    @property
    def kept_a(self) -> int:
        """Samples that the first policy keeps."""
        return self.both + sum(self.only_a.values())

    @property
    def kept_b(self) -> int:
        """Samples that the second policy keeps."""
        return self.both + sum(self.only_b.values())

    def markdown(self) -> str:
        """Return the comparison as Markdown tables."""
        lines = [
            f"a keeps {self.kept_a:,}, b keeps {self.kept_b:,}, both {self.both:,} of {self.samples:,} samples.",
            "",
        ]
        for keeps, rejects, reasons in (("a", "b", self.only_a), ("b", "a", self.only_b)):
            if reasons:
                lines += [f"| {keeps} keeps, {rejects} rejects for | samples |", "|:--|--:|"]
                lines += [f"| {', '.join(names)} | {count:,} |" for names, count in reasons.items()] + [""]
        if self.groups:
            lines += ["| group | samples | kept by a | kept by b |", "|:--|--:|--:|--:|"]
            lines += [
                f"| {cell('unknown' if name is None else name)} | {samples:,} | {a:,} | {b:,} |"
                for name, samples, a, b in self.groups
            ]
        return "\n".join(lines) + "\n"


def compare(
    pool: PoolRef,
    policy_a: Policy,
    policy_b: Policy,
    signals: Sequence[SignalRef],
    pairs: Sequence[PairsRef],
    *,
    evaluation_pools: Sequence[PoolRef] = (),
    warehouse: Warehouse,
    by: str | None = None,
) -> Comparison:
    """Decide by two policies and say where they differ, for all samples and for each value of `by`, a SQL expression.

    Decisions made here are kept, so publishing by either policy finds them. Raises what `decide` raises.
    """
    a, b = (
        decide(pool, policy, signals, pairs, evaluation_pools=evaluation_pools, warehouse=warehouse).ref
        for policy in (policy_a, policy_b)
    )
    columns = find_columns(pool, signals, warehouse=warehouse)
    with locked_connection() as connection:
        grouping = _grouping(connection, by, pa.schema([*columns.schema, *SAMPLE_COLUMNS]))
        rows = _read(pool, columns, None, grouping, warehouse)
        groups, names = _groups(connection, grouping, rows)
    one, other = (_decisions(pool, ref, warehouse) for ref in (a, b))
    kept_a, kept_b = (np.asarray(table["kept"]) for table in (one, other))
    counted = zip(names, *(_count(groups, names, m)[1:] for m in (kept_a | True, kept_a, kept_b)), strict=True)
    return Comparison(
        samples=pool.rows,
        both=int((kept_a & kept_b).sum()),
        only_a=_reasons(other, kept_a & ~kept_b),
        only_b=_reasons(one, kept_b & ~kept_a),
        overlap_a=count_overlap(one["failed"]),
        overlap_b=count_overlap(other["failed"]),
        groups=tuple(sorted(counted, key=lambda row: -row[1])),
    )


def _uses(condition: object, expression: Expression, parameter: str) -> bool:
    return parameter in expression.parameters or (
        isinstance(condition, TopFraction) and condition.top_fraction == f"${parameter}"
    )


def _with_value(checked: CheckedPolicy, parameter: str, value: float, columns: Columns) -> CheckedPolicy:
    """The policy with another value; checked anew only where the value is a share, as the rest reads it as it comes."""
    policy = checked.policy.with_parameters({parameter: value})
    return policy.check(columns.schema) if checked.fractions else replace(checked, policy=policy)


def _grouping(connection: duckdb.DuckDBPyConnection, by: str | None, offered: pa.Schema) -> Expression | None:
    if by is None:
        return None
    columns = pa.schema([field for field in offered if not pa.types.is_nested(field.type)])
    return check_expression(connection, f"({by})::VARCHAR", what="by", columns=columns, parameters={})


def _read(
    pool: PoolRef, columns: Columns, checked: CheckedPolicy | None, grouping: Expression | None, warehouse: Warehouse
) -> pa.Table:
    """All rows of the pool, with the columns that conditions and grouping read."""
    names = {name for expression in (checked.conditions if checked else ()) for name in expression.columns}
    names |= grouping.columns if grouping else frozenset()

    def read(shard: ShardRef) -> pa.Table:
        return columns.read(shard, names, warehouse=warehouse)

    return pa.concat_tables(in_order(read, pool.shards, threads=READERS))


def _groups(
    connection: duckdb.DuckDBPyConnection, grouping: Expression | None, rows: pa.Table
) -> tuple[NDArray[np.int64], list[str | None]]:
    """Each row's group as a place in the names that follow."""
    if grouping is None:
        return np.zeros(len(rows), np.int64), []
    encoded = evaluate(connection, [grouping], rows, parameters={})["c0"].combine_chunks().dictionary_encode("encode")
    return np.asarray(encoded.indices, np.int64), encoded.dictionary.to_pylist()


def _count(groups: NDArray[np.int64], names: list[str | None], mask: NDArray[np.bool_]) -> list[int]:
    """How many are true: of all, then of each group."""
    by_group: list[int] = np.bincount(groups[mask], minlength=len(names)).tolist() if names else []
    return [int(mask.sum()), *by_group]


def _passes(
    connection: duckdb.DuckDBPyConnection, checked: CheckedPolicy, places: Iterable[int], rows: pa.Table
) -> NDArray[np.bool_]:
    """Whether each row passes all of some conditions."""
    passes = np.ones(len(rows), bool)
    wanted = list(places)
    if not wanted:
        return passes
    found = evaluate(connection, [checked.conditions[at] for at in wanted], rows, parameters=checked.policy.parameters)
    for at, values in zip(wanted, found.columns, strict=True):
        if at in checked.fractions:
            passes &= in_top(np.asarray(values.cast(pa.float64()), np.float64), checked.fractions[at])
        else:
            passes &= np.asarray(pc.fill_null(values, False))
    return passes


def _decisions(pool: PoolRef, ref: DecisionsRef, warehouse: Warehouse) -> pa.Table:
    def read(shard: ShardRef) -> pa.Table:
        return warehouse.read_table(ref.table(shard), ["kept", "failed", "duplicate_rule"])

    return pa.concat_tables(
        [
            DECISIONS.empty_table().select(["kept", "failed", "duplicate_rule"]),
            *in_order(read, pool.shards, threads=READERS),
        ]
    )


def _reasons(decisions: pa.Table, where: NDArray[np.bool_]) -> dict[tuple[str, ...], int]:
    """Why the rows were rejected, the most frequent first; a duplicate's reason is its rule."""
    rows = decisions.filter(pa.array(where))
    reasons = zip(rows["failed"].to_pylist(), rows["duplicate_rule"].to_pylist(), strict=True)
    return dict(Counter(tuple(failed) or (f"duplicate: {rule}",) for failed, rule in reasons).most_common())
