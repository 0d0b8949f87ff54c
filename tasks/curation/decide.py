"""Deciding: for every sample of a pool, kept or not, all the reasons, and who stands in for a duplicate.

Only what the policy's SQL reads is loaded, shard by shard; no signal is computed, so another threshold costs seconds.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.fingerprint import fingerprint
from storage.record import Record, read_record, write_record
from storage.refs import DecisionsRef, Outcome, PairsRef, PoolRef, ShardRef, SignalRef
from storage.schema import DECISIONS
from storage.warehouse import Warehouse
from tasks.curation.columns import Columns, find_columns
from tasks.curation.conditions import PolicyError, evaluate, locked_connection
from tasks.curation.decontaminate import find_contamination, read_ids
from tasks.curation.duplicate_joins import Evidence, Rule
from tasks.curation.duplicates import Survivors, choose_survivors, read_evidence
from tasks.curation.funnel import Funnel, count_funnel
from tasks.curation.limits import ConceptCount, draw_balanced, over_cap
from tasks.curation.parallel import in_order
from tasks.curation.policy import (
    Balance,
    CapPer,
    CheckedPolicy,
    Condition,
    Decontamination,
    DuplicateRule,
    Policy,
    TopFraction,
)

VERSION = 1
READERS = 8
"""Shards read or written at once: enough to hide an object store's delay, few enough to hold in memory."""


def decide(
    pool: PoolRef,
    policy: Policy,
    signals: Sequence[SignalRef],
    pairs: Sequence[PairsRef],
    *,
    evaluation_pools: Sequence[PoolRef] = (),
    warehouse: Warehouse,
) -> Outcome[DecisionsRef]:
    """Apply `policy` to every sample of `pool` and write one decision table a shard.

    A sample that passes every condition and is nobody's duplicate is kept. Among duplicates the one the policy
    prefers survives, so a survivor is always kept; samples that fail a condition never survive nor remove others, and
    name a survivor too if they are its neighbours. Limits come last and leave out some of what would be kept. The
    record holds the funnel. `evaluation_pools` are those that the policy decontaminates against; the pairs must cover
    them too, beside the pool.

    Raises `PolicyError` before anything is read if the policy does not fit the signals and pairs, and
    `EvidenceError` if those don't fit the pool.
    """
    config, inputs = _depends_on(pool, policy, signals, pairs, evaluation_pools)
    ref = decisions_ref(pool, policy, signals, pairs, evaluation_pools)
    if read_record(warehouse, ref.record) is not None:
        return Outcome(ref, cached=True)

    columns = find_columns(pool, signals, warehouse=warehouse)
    checked = policy.check(columns.schema)
    rules = _rules(checked, pairs, warehouse)
    _require_evaluation(policy, pairs, evaluation_pools, warehouse)
    samples = _judge(pool, checked, columns, warehouse)
    copy_of = _copies(samples, checked, pairs, evaluation_pools, warehouse)
    evidence, positions = read_evidence(pairs, sample_ids=samples.sample_id, warehouse=warehouse)
    survivors = _survivors(samples, checked, rules, evidence=evidence, positions=positions)
    limited, concepts = _limit(pool, samples, checked, columns, survivors, positions, warehouse)
    tables = _Tables(checked, samples, copy_of, evidence, positions, survivors, limited)

    def write(part: tuple[ShardRef, slice]) -> None:
        shard, rows = part
        warehouse.write_table(ref.table(shard), tables.rows(rows))

    for _ in in_order(write, _parts(pool), threads=READERS):
        pass
    funnel = tables.funnel(concepts)
    record = Record("decide", ref.fingerprint, config, inputs, funnel.counts, funnel.as_dict())
    write_record(warehouse, ref.record, record)
    return Outcome(ref, cached=False)


def decisions_ref(
    pool: PoolRef,
    policy: Policy,
    signals: Sequence[SignalRef],
    pairs: Sequence[PairsRef],
    evaluation_pools: Sequence[PoolRef] = (),
) -> DecisionsRef:
    """Return where the decisions on these inputs lie, whether they were made yet or not."""
    identity = fingerprint(_depends_on(pool, policy, signals, pairs, evaluation_pools))
    return DecisionsRef(identity, f"decisions/{identity}")


def _depends_on(
    pool: PoolRef,
    policy: Policy,
    signals: Sequence[SignalRef],
    pairs: Sequence[PairsRef],
    evaluation_pools: Sequence[PoolRef],
) -> tuple[dict[str, Any], dict[str, Any]]:
    config = {"version": VERSION, "policy": policy.model_dump(mode="json")}
    inputs = {
        "pool": pool.fingerprint,
        "signals": [[signal.signal, signal.fingerprint] for signal in signals],
        "pairs": [[pair.kind, pair.fingerprint] for pair in pairs],
        "evaluation_pools": [other.fingerprint for other in evaluation_pools],
    }
    return config, inputs


@dataclass(frozen=True)
class _Samples:
    """All samples of a pool in its order: ids, one bit a condition they fail, what the policy prefers and limits by."""

    sample_id: pa.ChunkedArray
    failed: NDArray[np.uint64]
    preferences: list[pa.ChunkedArray]
    groups: dict[int, pa.ChunkedArray]


def _judge(pool: PoolRef, checked: CheckedPolicy, columns: Columns, warehouse: Warehouse) -> _Samples:
    """Evaluate every expression on every sample, a few shards in memory at a time."""

    def read(shard: ShardRef) -> pa.Table:
        return columns.read(shard, checked.columns, warehouse=warehouse)

    ids: list[pa.ChunkedArray] = []
    failed: list[NDArray[np.uint64]] = []
    ranked: dict[int, list[NDArray[np.float64]]] = {at: [] for at in checked.fractions}
    preferred: list[pa.Table] = []
    with locked_connection() as connection:
        for rows in in_order(read, pool.shards, threads=READERS):
            values = _evaluate(connection, checked, rows)
            bits = np.zeros(len(rows), np.uint64)
            for at in range(len(checked.conditions)):
                if at in ranked:
                    ranked[at].append(np.asarray(values.column(at).cast(pa.float64()), np.float64))
                else:
                    passes = np.asarray(pc.fill_null(values.column(at), False))
                    bits |= ~passes * np.uint64(1 << at)
            ids.append(rows["sample_id"])
            failed.append(bits)
            preferred.append(values.select(range(len(checked.conditions), values.num_columns)))
    all_failed = np.concatenate(failed)
    for at, scores in ranked.items():
        all_failed |= ~in_top(np.concatenate(scores), checked.fractions[at]) * np.uint64(1 << at)
    sample_id = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string())
    others = pa.concat_tables(preferred).columns
    groups = dict(zip(checked.groups, others[len(checked.prefer) :], strict=True))
    return _Samples(sample_id, all_failed, others[: len(checked.prefer)], groups)


def _evaluate(connection: duckdb.DuckDBPyConnection, checked: CheckedPolicy, rows: pa.Table) -> pa.Table:
    parameters = checked.policy.parameters
    if not checked.expressions:
        return pa.table({})
    try:
        return evaluate(connection, checked.expressions, rows, parameters=parameters)
    except duckdb.Error:
        for expression in checked.expressions:
            try:
                evaluate(connection, [expression], rows, parameters=parameters)
            except duckdb.Error as error:
                reason = str(error).splitlines()[0].rstrip(".")
                raise PolicyError(
                    f"{checked.policy.origin}: {expression.sql!r} met a value it can't handle: {reason}. "
                    "Use try_cast(… as …) or try(…), which give NULL instead; a condition that is NULL fails."
                ) from None
        raise


def in_top(scores: NDArray[np.float64], fraction: float) -> NDArray[np.bool_]:
    """DataComp's rule: at least as good as place int(N·fraction) of all N; NaN stands for NULL and never passes."""
    valid = scores[~np.isnan(scores)]
    place = int(len(scores) * fraction)
    if place >= len(valid):
        return ~np.isnan(scores)
    threshold: np.float64 = -np.partition(-valid, place)[place]
    return np.asarray(scores >= threshold)


def _rules(checked: CheckedPolicy, pairs: Sequence[PairsRef], warehouse: Warehouse) -> list[Rule]:
    """The duplicate rules, if the pairs they need were looked for, and as far as they reach."""
    policy = checked.policy
    rules = []
    for rule, distance, confirm in zip(policy.duplicates, checked.distances, checked.confirmations, strict=True):
        what = f'{policy.origin}: duplicate rule "{rule.name}"'
        for kind in sorted(rule.kinds):
            wanted = distance if kind in rule.pairs or confirm is None else confirm
            _require_pairs(what, kind, wanted, pairs, warehouse)
        rules.append(Rule(rule.pairs, distance, rule.rule, confirm))
    return rules


def _require_evaluation(
    policy: Policy, pairs: Sequence[PairsRef], evaluation_pools: Sequence[PoolRef], warehouse: Warehouse
) -> None:
    """Raise `PolicyError` unless the evaluation sets that the policy names are given, and pairs to find copies by."""
    given = {pool.name for pool in evaluation_pools if pool.rows}
    for rule in policy.decontaminate:
        what = f'{policy.origin}: decontaminate "{rule.name}"'
        for name in rule.against:
            if name not in given:
                raise PolicyError(f"{what} names pool {name}, which is empty or was not given. Ingest the set into it.")
        for kind in rule.pairs:
            wanted = policy.number(rule.max_distance, f"{what}, max_distance")
            _require_pairs(what, kind, wanted, pairs, warehouse)


def _require_pairs(what: str, kind: str, wanted: float, pairs: Sequence[PairsRef], warehouse: Warehouse) -> None:
    known = {pair.kind: pair for pair in pairs}
    if kind not in known:
        at_hand = ", ".join(known) or "none"
        raise PolicyError(f"{what} needs pairs of kind {kind}, which were not found. Kinds at hand: {at_hand}.")
    reach = _reach(known[kind], warehouse)
    if wanted > reach:
        raise PolicyError(
            f"{what} reaches to distance {wanted:g}, but pairs of kind {kind} were only looked for up to "
            f"{reach:g}. Look for them with max_distance={wanted:g} first, or ask for less."
        )


def _copies(
    samples: _Samples,
    checked: CheckedPolicy,
    pairs: Sequence[PairsRef],
    evaluation_pools: Sequence[PoolRef],
    warehouse: Warehouse,
) -> pa.ChunkedArray:
    """The evaluation sample that each sample is a copy of, or null; sets the bits of the copies' reasons."""
    policy = checked.policy
    known = {pool.name: pool for pool in evaluation_pools}
    copy_of = pa.chunked_array([pa.nulls(len(samples.failed), pa.string())])
    for at, rule in enumerate(policy.decontaminate):
        against = [known[name] for name in rule.against]
        found = find_contamination(
            samples.sample_id,
            read_ids(against, warehouse),
            [pair for pair in pairs if pair.kind in rule.pairs],
            max_distance=policy.number(rule.max_distance, f'decontaminate "{rule.name}", max_distance'),
            warehouse=warehouse,
        )
        samples.failed[:] |= np.asarray(found.is_valid()) * np.uint64(1 << (len(policy.conditions) + at))
        copy_of = pc.coalesce(copy_of, found)
    return copy_of


def _reach(pairs: PairsRef, warehouse: Warehouse) -> float:
    """The largest distance that pairs were looked for, as their table's record says; no limit for equal ones."""
    record = read_record(warehouse, pairs.paths[0].removesuffix(".parquet") + ".json") if pairs.paths else None
    return float(record.config.get("max_distance", math.inf)) if record else math.inf


def _survivors(
    samples: _Samples,
    checked: CheckedPolicy,
    rules: list[Rule],
    *,
    evidence: Evidence,
    positions: NDArray[np.int32],
) -> Survivors:
    """Line up the paired samples that pass every condition, best first, ties by sample_id, and let them choose."""
    rows = np.flatnonzero((positions >= 0) & (samples.failed == 0))
    values = {f"by{at}": column.take(pa.array(rows)) for at, column in enumerate(samples.preferences)}
    candidates = pa.table({"position": positions[rows], **values})
    order = [f"by{at} {'DESC' if down else 'ASC'} NULLS LAST" for at, down in enumerate(checked.descending)]
    with locked_connection() as connection:
        connection.register("candidates", candidates)
        best_first = connection.sql(f"SELECT position FROM candidates ORDER BY {', '.join([*order, 'position'])}")
        ranked = best_first.fetchnumpy()["position"]  # positions are in the order of ids
    return choose_survivors(evidence, rules, candidates=ranked)


def _limit(
    pool: PoolRef,
    samples: _Samples,
    checked: CheckedPolicy,
    columns: Columns,
    survivors: Survivors,
    positions: NDArray[np.int32],
    warehouse: Warehouse,
) -> tuple[NDArray[np.int8], list[ConceptCount]]:
    """Which limit leaves out each sample, -1 for none, and the concepts before and after the last balance."""
    limited = np.full(len(samples.failed), -1, np.int8)
    is_duplicate = (np.append(survivors.survivor, -1)[positions] >= 0) & (positions >= 0)
    counts: list[ConceptCount] = []
    for at, (limit, at_most) in enumerate(zip(checked.policy.limits, checked.at_most, strict=True)):
        left = np.flatnonzero((samples.failed == 0) & ~is_duplicate & (limited < 0))
        rows = pa.array(left)
        ids = samples.sample_id.take(rows)
        group = samples.groups[at].take(rows) if at in samples.groups else None
        if isinstance(limit, Balance):
            out, counts = draw_balanced(
                limit, at_most, _concepts(pool, columns, warehouse, checked).take(rows), group, ids
            )
        else:
            preferences = [column.take(rows) for column in samples.preferences]
            out = over_cap(at_most, group, preferences, checked.descending, ids)
        limited[left[out]] = at
    return limited, counts


def _concepts(pool: PoolRef, columns: Columns, warehouse: Warehouse, checked: CheckedPolicy) -> pa.ChunkedArray:
    """The concepts of every sample."""
    found = [signal for signal in columns.by_signal if signal.signal == "concepts"]
    if not found:
        raise PolicyError(
            f"{checked.policy.origin}: a balance needs the signal concepts. Add it to the signals to measure."
        )

    def read(shard: ShardRef) -> pa.Table:
        return warehouse.read_table(found[0].table(shard), ["concepts"])

    return pa.concat_tables(in_order(read, pool.shards, threads=READERS))["concepts"]


@dataclass(frozen=True)
class _Tables:
    """The decisions on all samples, as rows of `DECISIONS` and as a funnel."""

    checked: CheckedPolicy
    samples: _Samples
    copy_of: pa.ChunkedArray
    evidence: Evidence
    positions: NDArray[np.int32]
    survivors: Survivors
    limited: NDArray[np.int8]

    def rows(self, rows: slice) -> pa.Table:
        """The decision table of some of the samples."""
        policy = self.checked.policy
        failed, positions = self.samples.failed[rows], self.positions[rows]
        survivor = self._of_pair(self.survivors.survivor, positions)
        is_duplicate = survivor >= 0
        rule = self._of_pair(self.survivors.rule, positions)
        distance = self._of_pair(self.survivors.distance, positions)
        limited = self.limited[rows]
        columns = [
            self.samples.sample_id.slice(rows.start, rows.stop - rows.start),
            pa.array((failed == 0) & ~is_duplicate & (limited < 0)),
            self._reasons(failed, limited),
            self.evidence.ids.take(pa.array(survivor, mask=~is_duplicate)),
            pa.array([r.name for r in policy.duplicates], pa.string()).take(pa.array(rule, mask=~is_duplicate)),
            pa.array(distance, pa.float32(), mask=~is_duplicate),
            self.copy_of.slice(rows.start, rows.stop - rows.start),
        ]
        return pa.table(columns, schema=DECISIONS)

    def funnel(self, concepts: list[ConceptCount]) -> Funnel:
        """The funnel over all samples."""
        policy = self.checked.policy
        return count_funnel(
            policy.name,
            conditions=[
                *((condition.name, self._text(condition)) for condition in policy.conditions),
                *((rule.name, _copies_text(policy, rule)) for rule in policy.decontaminate),
            ],
            rules=[(rule.name, _rule_text(policy, rule)) for rule in policy.duplicates],
            failed=self.samples.failed,
            taken_by=self._of_pair(self.survivors.rule, self.positions),
            limits=[
                (limit.name, _limit_text(limit, at_most))
                for limit, at_most in zip(policy.limits, self.checked.at_most, strict=True)
            ],
            limited=self.limited,
            concepts=concepts,
        )

    def _reasons(self, failed: NDArray[np.uint64], limited: NDArray[np.int8]) -> pa.ListArray:
        """Names of all conditions that samples fail, or of the one limit that leaves them out."""
        policy = self.checked.policy
        names = failed_names(failed, [entry.name for entry in (*policy.conditions, *policy.decontaminate)])
        if not policy.limits:
            return names
        bits = np.where(limited >= 0, np.uint64(1) << np.maximum(limited, 0).astype(np.uint64), np.uint64(0))
        by_limit = failed_names(bits, [limit.name for limit in policy.limits])
        return pc.if_else(pa.array(limited >= 0), by_limit, names)

    def _of_pair(self, values: NDArray[Any], positions: NDArray[np.int32]) -> NDArray[Any]:
        """What the evidence says of each sample, -1 for samples in no pair."""
        return np.where(positions >= 0, np.append(values, -1)[positions], -1)

    def _text(self, condition: Condition | TopFraction) -> str:
        """A condition as people read it, with the parameters' values."""
        parameters = self.checked.policy.parameters
        if isinstance(condition, TopFraction):
            text = f"top {condition.top_fraction} of all by {condition.of}"
        else:
            text = condition.sql
        return re.sub(r"\$([a-z][a-z0-9_]*)", lambda found: str(parameters.get(found[1], found[0])), text)


def _rule_text(policy: Policy, rule: DuplicateRule) -> str:
    """A duplicate rule as people read it, with the parameters' values."""
    distance = policy.number(rule.max_distance, f'duplicate rule "{rule.name}", max_distance')
    text = ", ".join(rule.pairs) + (f" within {distance:g}" if distance else "")
    if rule.confirm is not None:
        confirm = policy.number(rule.confirm, f'duplicate rule "{rule.name}", confirm')
        text += f", embeddings within {confirm:g}"
    return text if rule.rule == "greedy" else f"{text}, {rule.rule}"


def _copies_text(policy: Policy, rule: Decontamination) -> str:
    distance = policy.number(rule.max_distance, rule.name)
    near = f" within {distance:g}" if distance else ""
    return f"no copy of {', '.join(rule.against)} by {', '.join(rule.pairs)}{near}"


def _limit_text(limit: CapPer | Balance, at_most: int) -> str:
    """A limit as people read it."""
    if isinstance(limit, CapPer):
        return f"at most {at_most:,} per {limit.cap_per}"
    return f"concepts balanced to {at_most:,}" + (f" per {limit.per}" if limit.per else "")


def failed_names(failed: NDArray[np.uint64], names: Sequence[str]) -> pa.ListArray:
    """Return the names whose bits are set, in order, as one list a sample."""
    bits = np.uint64(1) << np.arange(len(names), dtype=np.uint64)
    is_failed = (failed[:, None] & bits) != 0
    offsets = np.concatenate([[0], np.cumsum(is_failed.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(names, pa.string()).take(pa.array(np.nonzero(is_failed)[1]))
    )


def _parts(pool: PoolRef) -> list[tuple[ShardRef, slice]]:
    """Each shard with the place of its rows among all of the pool's."""
    ends = list(accumulate(shard.rows for shard in pool.shards))
    return [(shard, slice(end - shard.rows, end)) for shard, end in zip(pool.shards, ends, strict=True)]
