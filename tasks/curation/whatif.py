"""What if: one threshold at many values, or two policies side by side, over evidence that is there already.

Each expression is evaluated once for all values and policies that share it; nothing is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from storage.refs import PairsRef, PoolRef, SignalRef
from storage.schema import column
from storage.warehouse import Warehouse
from tasks.curation.columns import Columns, find_columns
from tasks.curation.conditions import Expression, PolicyError
from tasks.curation.evaluations import Bound, bind, check_grouping, evaluate_pool, passes_condition
from tasks.curation.funnel import cell, count_overlap
from tasks.curation.judge import Judge, Verdicts, failed_names
from tasks.curation.policy import CheckedPolicy, Condition, Policy, TopFraction

SWEEP = pa.schema(
    [
        column("value", pa.float64(), "the parameter's value"),
        column("group", pa.string(), "the samples' value of `by`, which may be null"),
        column("of_all", pa.bool_(), "the row is of all samples, not of those with this value"),
        column("samples", pa.int64(), "samples in the group, or all"),
        column("passing", pa.int64(), "those that pass every condition, before decontamination, duplicates and limits"),
        column("fails", pa.int64(), "those that fail a condition that uses the parameter"),
        column("fails_alone", pa.int64(), "those that fail no other condition"),
    ]
)

SHOWN_GROUPS = 50
"""Groups in Markdown: there may be as many as hosts in a pool, and an artifact takes no megabytes."""


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
    """Return how many samples would pass the policy's conditions at every value of a parameter, as rows of `SWEEP`.

    Conditions alone are looked at, top fractions among them: what decontamination, duplicates and limits would take
    of those that pass is not taken off, so more pass than would be kept. `compare` counts what would be kept.
    With `by`, a SQL expression such as `language` or `split_part(url, '/', 3)`, there is a row for each of its values
    too. Raises `PolicyError` if no condition uses the parameter, or a value or `by` does not fit.
    """
    columns = find_columns(pool, signals, warehouse=warehouse)
    checked = policy.check(columns.schema)
    used = [at for at, one in enumerate(policy.conditions) if _uses(one, checked.conditions[at], parameter)]
    others = [at for at in range(len(policy.conditions)) if at not in used]
    trials = [_with_value(checked, parameter, value, columns) for value in values]
    if not used:
        raise PolicyError(f"{policy.origin}: no condition uses ${parameter}, so there is nothing to sweep.")
    grouping = [] if by is None else [check_grouping(by, columns)]
    wanted = [*grouping, *bind(checked, [checked.conditions[at] for at in others])]
    wanted += [bound for trial in trials for bound in bind(trial, [trial.conditions[at] for at in used])]
    _, found = evaluate_pool(pool, columns, wanted, warehouse=warehouse)
    groups, names = _groups(found[grouping[0]] if grouping else None, pool.rows)
    passes_others = _passes(checked, others, found, pool.rows)
    rows = []
    for value, trial in zip(values, trials, strict=True):
        passes = _passes(trial, used, found, pool.rows)
        masks = (np.ones(pool.rows, bool), passes & passes_others, ~passes, ~passes & passes_others)
        counts = [_count(groups, names, mask) for mask in masks]
        of = [(None, True), *((name, False) for name in names)]
        rows += [(float(value), *row[0], *row[1:]) for row in zip(of, *counts, strict=True)]
    return pa.Table.from_pylist([dict(zip(SWEEP.names, row, strict=True)) for row in rows], schema=SWEEP)


@dataclass(frozen=True)
class Comparison:
    """Two policies on one pool: samples kept by both, one or none, and why.

    `only_a` and `only_b` map the reasons that the other policy gives to the number of samples it rejects for them;
    `overlap_a` and `overlap_b` map a pair of conditions to the samples that fail both, of equal names to those that
    fail this one alone; `groups` are rows of (group, samples, kept by a, kept by b), largest first.
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
        """Return the comparison as Markdown tables, with the largest groups."""
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
                for name, samples, a, b in self.groups[:SHOWN_GROUPS]
            ]
            rest = self.groups[SHOWN_GROUPS:]
            if rest:
                samples, a, b = (sum(counts) for counts in list(zip(*rest, strict=True))[1:])
                lines.append(f"| {len(rest):,} more | {samples:,} | {a:,} | {b:,} |")
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
    """Say where two policies differ, for all samples and for each value of `by`, a SQL expression.

    The verdicts are those that `decide` would write, but nothing is written. Raises what `decide` raises.
    """
    policies = (policy_a, policy_b)
    judge = Judge.of(pool, policies, signals, pairs, evaluation_pools=evaluation_pools, warehouse=warehouse, by=by)
    a, b = judge.verdicts()
    groups, names = _groups(judge.groups, pool.rows)
    counted = zip(names, *(_count(groups, names, kept)[1:] for kept in (a.kept | True, a.kept, b.kept)), strict=True)
    return Comparison(
        samples=pool.rows,
        both=int((a.kept & b.kept).sum()),
        only_a=_rejections(b, a.kept & ~b.kept),
        only_b=_rejections(a, b.kept & ~a.kept),
        overlap_a=count_overlap(_failures(a, ~a.kept)),
        overlap_b=count_overlap(_failures(b, ~b.kept)),
        groups=tuple(sorted(counted, key=lambda row: -row[1])),
    )


def _uses(condition: Condition | TopFraction, expression: Expression, parameter: str) -> bool:
    return parameter in expression.parameters or (
        isinstance(condition, TopFraction) and condition.top_fraction == f"${parameter}"
    )


def _with_value(checked: CheckedPolicy, parameter: str, value: float, columns: Columns) -> CheckedPolicy:
    """The policy with another value; checked anew only where the value is a share, as the rest reads it as it comes."""
    policy = checked.policy.with_parameters({parameter: value})
    return policy.check(columns.schema) if checked.fractions else replace(checked, policy=policy)


def _passes(
    checked: CheckedPolicy, places: Sequence[int], found: Mapping[Bound, pa.ChunkedArray], samples: int
) -> NDArray[np.bool_]:
    """Whether each sample passes all of some conditions."""
    passes = np.ones(samples, bool)
    for at, bound in zip(places, bind(checked, [checked.conditions[at] for at in places]), strict=True):
        passes &= passes_condition(found[bound], checked.fractions.get(at))
    return passes


def _groups(values: pa.ChunkedArray | None, samples: int) -> tuple[NDArray[np.int64], list[str | None]]:
    """Each sample's group as a place in the names that follow."""
    if values is None:
        return np.zeros(samples, np.int64), []
    encoded = values.combine_chunks().dictionary_encode("encode")
    return np.asarray(encoded.indices, np.int64), encoded.dictionary.to_pylist()


def _count(groups: NDArray[np.int64], names: list[str | None], mask: NDArray[np.bool_]) -> list[int]:
    """How many are true: of all, then of each group."""
    by_group: list[int] = np.bincount(groups[mask], minlength=len(names)).tolist() if names else []
    return [int(mask.sum()), *by_group]


def _rejections(verdicts: Verdicts, where: NDArray[np.bool_]) -> dict[tuple[str, ...], int]:
    """Samples by why they are rejected, the most frequent reasons first; a duplicate's reason is its rule."""
    rules = verdicts.checked.policy.duplicates
    is_duplicate = where & (verdicts.failed == 0) & (verdicts.rule >= 0)
    taken = np.bincount(verdicts.rule[is_duplicate], minlength=len(rules)).tolist()
    found = _failures(verdicts, where)
    found |= {(f"duplicate: {rule.name}",): count for rule, count in zip(rules, taken, strict=True) if count}
    return dict(sorted(found.items(), key=lambda reason: (-reason[1], reason[0])))


def _failures(verdicts: Verdicts, where: NDArray[np.bool_]) -> dict[tuple[str, ...], int]:
    """Samples by all the conditions that they fail, or by the limit that leaves them out."""
    policy = verdicts.checked.policy
    bits, counts = np.unique(verdicts.failed[where & (verdicts.failed != 0)], return_counts=True)
    names = failed_names(bits, [entry.name for entry in (*policy.conditions, *policy.decontaminate)]).to_pylist()
    found = dict(zip(map(tuple, names), counts.tolist(), strict=True))
    out = np.bincount(verdicts.limited[where & (verdicts.limited >= 0)], minlength=len(policy.limits)).tolist()
    return found | {(limit.name,): count for limit, count in zip(policy.limits, out, strict=True) if count}
