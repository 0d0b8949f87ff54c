"""Deciding: for every sample of a pool, kept or not, all the reasons, and who stands in for a duplicate.

Only what the policy's SQL reads is loaded, shard by shard; no signal is computed, so another threshold costs seconds.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.fingerprint import fingerprint
from storage.record import Record, read_record, write_record
from storage.refs import DecisionsRef, Outcome, PairsRef, PoolRef, ShardRef, SignalRef
from storage.schema import DECISIONS
from storage.warehouse import Warehouse
from tasks.curation.conditions import Value
from tasks.curation.funnel import Funnel, count_funnel, with_values
from tasks.curation.judge import Judge, Verdicts, failed_names
from tasks.curation.parallel import in_order
from tasks.curation.policy import Balance, CapPer, Condition, Decontamination, DuplicateRule, Policy, TopFraction

VERSION = 2
WRITERS = 8
"""Shards written at once: enough to hide an object store's delay, few enough to hold in memory."""


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

    judge = Judge.of(pool, [policy], signals, pairs, evaluation_pools=evaluation_pools, warehouse=warehouse)
    (verdicts,) = judge.verdicts()

    def write(part: tuple[ShardRef, slice]) -> None:
        shard, rows = part
        warehouse.write_table(ref.table(shard), _rows(verdicts, rows))

    for _ in in_order(write, _parts(pool), threads=WRITERS):
        pass
    funnel = _funnel(verdicts)
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


def _rows(verdicts: Verdicts, rows: slice) -> pa.Table:
    """The decision table of some of the samples."""
    said, count = verdicts.survivors, rows.stop - rows.start
    survivor, rule = (verdicts.of_pair(values, rows) for values in (said.survivor, said.rule))
    is_duplicate = survivor >= 0
    names = pa.array([rule.name for rule in verdicts.checked.policy.duplicates], pa.string())
    columns = [
        verdicts.sample_id.slice(rows.start, count),
        pa.array(verdicts.kept[rows]),
        _reasons(verdicts, rows),
        verdicts.evidence.ids.take(pa.array(survivor, mask=~is_duplicate)),
        names.take(pa.array(rule, mask=~is_duplicate)),
        pa.array(verdicts.of_pair(said.distance, rows), pa.float32(), mask=~is_duplicate),
        verdicts.copy_of.slice(rows.start, count),
    ]
    return pa.table(columns, schema=DECISIONS)


def _reasons(verdicts: Verdicts, rows: slice) -> pa.ListArray:
    """Names of all conditions that samples fail, or of the one limit that leaves them out."""
    policy, limited = verdicts.checked.policy, verdicts.limited[rows]
    names = failed_names(verdicts.failed[rows], [entry.name for entry in (*policy.conditions, *policy.decontaminate)])
    if not policy.limits:
        return names
    bits = np.where(limited >= 0, np.uint64(1) << np.maximum(limited, 0).astype(np.uint64), np.uint64(0))
    by_limit = failed_names(bits, [limit.name for limit in policy.limits])
    return pc.if_else(pa.array(limited >= 0), by_limit, names)


def _funnel(verdicts: Verdicts) -> Funnel:
    """The funnel over all samples."""
    policy = verdicts.checked.policy
    return count_funnel(
        policy.name,
        conditions=[
            *((condition.name, condition_text(condition, policy.parameters)) for condition in policy.conditions),
            *((rule.name, _copies_text(policy, rule)) for rule in policy.decontaminate),
        ],
        rules=[(rule.name, _rule_text(policy, rule)) for rule in policy.duplicates],
        failed=verdicts.failed,
        taken_by=verdicts.rule,
        limits=[
            (limit.name, _limit_text(limit, at_most))
            for limit, at_most in zip(policy.limits, verdicts.checked.at_most, strict=True)
        ],
        limited=verdicts.limited,
        concepts=verdicts.concepts,
    )


def condition_text(condition: Condition | TopFraction, parameters: Mapping[str, Value]) -> str:
    """Return a condition as people read it, with the parameters' values."""
    if isinstance(condition, TopFraction):
        text = f"top {condition.top_fraction} of all by {condition.of}"
    else:
        text = condition.sql
    return with_values(text, parameters)


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


def _parts(pool: PoolRef) -> list[tuple[ShardRef, slice]]:
    """Each shard with the place of its rows among all of the pool's."""
    ends = list(accumulate(shard.rows for shard in pool.shards))
    return [(shard, slice(end - shard.rows, end)) for shard, end in zip(pool.shards, ends, strict=True)]
