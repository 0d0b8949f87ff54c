"""Judging: what policies say of every sample of a pool, in memory and as numbers, with nothing written.

Evidence is read once for all the policies, and an expression that several of them share is evaluated once.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.refs import PairsRef, PoolRef, ShardRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.columns import Columns, find_columns
from tasks.curation.conditions import PolicyError, locked_connection
from tasks.curation.decontaminate import find_contamination, read_ids
from tasks.curation.duplicate_joins import Evidence, Rule
from tasks.curation.duplicates import StoredPairs, Survivors, choose_survivors
from tasks.curation.evaluations import READERS, Bound, bind, check_grouping, evaluate_pool, passes_condition
from tasks.curation.limits import ConceptCount, draw_balanced, over_cap
from tasks.curation.pair_reach import duplicate_rules, require_evaluation
from tasks.curation.parallel import in_order
from tasks.curation.policy import Balance, CheckedPolicy, Policy


@dataclass(frozen=True)
class Verdicts:
    """What one policy says of every sample, in the pool's order.

    `failed` has one bit for each condition that a sample fails, the first lowest, then one for each evaluation set it
    is a copy from; `copy_of` names the evaluation sample, or is null. `survivors` are by the evidence's ids, and
    `positions` says where each sample is among these, or -1. `limited` is the place of the limit that leaves a sample
    out, or -1; `concepts` are counted before and after the last balance.
    """

    checked: CheckedPolicy
    sample_id: pa.ChunkedArray
    failed: NDArray[np.uint64]
    copy_of: pa.ChunkedArray
    evidence: Evidence
    positions: NDArray[np.int32]
    survivors: Survivors
    limited: NDArray[np.int8]
    concepts: Sequence[ConceptCount] = ()

    @cached_property
    def rule(self) -> NDArray[np.int32]:
        """The place of the duplicate rule that takes each sample, or -1."""
        return self.of_pair(self.survivors.rule)

    @cached_property
    def kept(self) -> NDArray[np.bool_]:
        """Whether each sample is kept."""
        return np.asarray((self.failed == 0) & (self.rule < 0) & (self.limited < 0))

    def of_pair(self, values: NDArray[Any], rows: slice = slice(None)) -> NDArray[Any]:
        """Return what is said of the evidence's ids for some of the samples, -1 for those in no pair."""
        return np.concatenate([values, np.array([-1], values.dtype)])[self.positions[rows]]


@dataclass(frozen=True)
class Judge:
    """All that some policies need to know of a pool's samples, read once; what they share is worked out once.

    `values` are by the pool's order, as are `groups`, the text that a SQL expression asked for gives for each sample,
    and `positions`, each sample's place among the evidence's ids, or -1.
    """

    pool: PoolRef
    policies: Sequence[CheckedPolicy]
    rules: Sequence[list[Rule]]
    columns: Columns
    sample_id: pa.ChunkedArray
    values: Mapping[Bound, pa.ChunkedArray]
    groups: pa.ChunkedArray | None
    evidence: Evidence
    positions: NDArray[np.int32]
    pairs: Sequence[PairsRef]
    evaluation_pools: Sequence[PoolRef]
    warehouse: Warehouse
    _copied: dict[tuple[Any, ...], pa.Array] = field(default_factory=dict)
    _failing: dict[tuple[Bound, float | None], NDArray[np.bool_]] = field(default_factory=dict)
    _ordered: dict[tuple[Any, ...], NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        pool: PoolRef,
        policies: Sequence[Policy],
        signals: Sequence[SignalRef],
        pairs: Sequence[PairsRef],
        *,
        evaluation_pools: Sequence[PoolRef] = (),
        warehouse: Warehouse,
        by: str | None = None,
    ) -> "Judge":
        """Check the policies and `by`, a SQL expression to group samples by, and read what they need.

        Raises `PolicyError` before anything is read if a policy or `by` does not fit the signals and pairs, and
        `EvidenceError` if those don't fit the pool.
        """
        columns = find_columns(pool, signals, warehouse=warehouse)
        checked = [policy.check(columns.schema) for policy in policies]
        rules = [duplicate_rules(one, pairs, warehouse) for one in checked]
        for policy in policies:
            require_evaluation(policy, pairs, evaluation_pools, warehouse)
        grouping = [] if by is None else [check_grouping(by, columns)]
        wanted = [bound for one in checked for bound in bind(one, one.expressions)]
        kinds = {kind for policy in policies for rule in policy.duplicates for kind in rule.kinds}
        with ThreadPoolExecutor(1) as beside:
            stored = beside.submit(StoredPairs.read, [pair for pair in pairs if pair.kind in kinds], warehouse)
            ids, values = evaluate_pool(pool, columns, wanted + grouping, warehouse=warehouse)
        evidence, positions = stored.result().among(ids)
        groups = values[grouping[0]] if grouping else None
        return cls(
            pool, checked, rules, columns, ids, values, groups, evidence, positions, pairs, evaluation_pools, warehouse
        )

    def verdicts(self) -> Iterator[Verdicts]:
        """Return what each policy says, in order."""
        for checked in self.policies:
            self._best_first(checked)  # before two threads work out the same order
        return in_order(self._verdicts, list(zip(self.policies, self.rules, strict=True)), threads=2)

    def _verdicts(self, policy: tuple[CheckedPolicy, list[Rule]]) -> Verdicts:
        checked, rules = policy
        copies = self._copies(checked.policy)
        failed = self._failed(checked, copies)
        order = self._best_first(checked)
        candidates = self.positions[order[failed[order] == 0]]
        verdicts = Verdicts(
            checked,
            self.sample_id,
            failed,
            pc.coalesce(pa.chunked_array([pa.nulls(len(failed), pa.string())]), *copies),
            self.evidence,
            self.positions,
            choose_survivors(self.evidence, rules, candidates=candidates),
            np.full(len(failed), -1, np.int8),
        )
        return self._limit(verdicts) if checked.policy.limits else verdicts

    def _copies(self, policy: Policy) -> list[pa.Array]:
        """For each decontamination, the evaluation sample that each sample is a copy of, or null."""
        pools = {pool.name: pool for pool in self.evaluation_pools}
        found = []
        for rule in policy.decontaminate:
            reach = policy.number(rule.max_distance, f'decontaminate "{rule.name}", max_distance')
            case = (rule.against, rule.pairs, reach)
            if case not in self._copied:
                self._copied[case] = find_contamination(
                    self.sample_id,
                    read_ids([pools[name] for name in rule.against], self.warehouse),
                    [pair for pair in self.pairs if pair.kind in rule.pairs],
                    max_distance=reach,
                    warehouse=self.warehouse,
                )
            found.append(self._copied[case])
        return found

    def _failed(self, checked: CheckedPolicy, copies: Sequence[pa.Array]) -> NDArray[np.uint64]:
        """One bit for each condition that a sample fails and for each evaluation set that it is a copy from."""
        failed = np.zeros(len(self.sample_id), np.uint64)
        bounds = bind(checked, checked.conditions)
        fails = [self._fails(bound, checked.fractions.get(at)) for at, bound in enumerate(bounds)]
        for at, fail in enumerate([*fails, *(np.asarray(copied.is_valid()) for copied in copies)]):
            failed |= fail * np.uint64(1 << at)
        return failed

    def _fails(self, bound: Bound, fraction: float | None) -> NDArray[np.bool_]:
        """Whether each sample fails a condition: NULL does."""
        case = (bound, fraction)
        if case not in self._failing:
            self._failing[case] = ~passes_condition(self.values[bound], fraction)
        return self._failing[case]

    def _best_first(self, checked: CheckedPolicy) -> NDArray[np.int64]:
        """The paired samples as the policy prefers them, ties by sample_id, which is the order of their positions."""
        bounds = bind(checked, checked.prefer)
        case = (*bounds, checked.descending)
        if case not in self._ordered:
            rows = np.flatnonzero(self.positions >= 0)
            columns = {f"by{at}": self.values[bound].take(pa.array(rows)) for at, bound in enumerate(bounds)}
            keys = [f"by{at} {'DESC' if down else 'ASC'} NULLS LAST" for at, down in enumerate(checked.descending)]
            with locked_connection() as connection:
                connection.register("paired", pa.table({"row": rows, "position": self.positions[rows], **columns}))
                best_first = connection.sql(f"SELECT row FROM paired ORDER BY {', '.join([*keys, 'position'])}")
                self._ordered[case] = best_first.fetchnumpy()["row"]
        return self._ordered[case]

    def _limit(self, verdicts: Verdicts) -> Verdicts:
        """The verdicts with what the policy's limits leave out of the samples that are left so far."""
        checked, limited = verdicts.checked, verdicts.limited.copy()
        prefer = [self.values[bound] for bound in bind(checked, checked.prefer)]
        concepts: Sequence[ConceptCount] = ()
        for at, (limit, at_most) in enumerate(zip(checked.policy.limits, checked.at_most, strict=True)):
            left = np.flatnonzero(verdicts.kept & (limited < 0))
            rows = pa.array(left)
            ids = self.sample_id.take(rows)
            group = None
            if at in checked.groups:
                (bound,) = bind(checked, [checked.groups[at]])
                group = self.values[bound].take(rows)
            if isinstance(limit, Balance):
                mentioned = self._concepts(checked.policy).take(rows)
                out, concepts = draw_balanced(limit, at_most, mentioned, group, ids)
            else:
                out = over_cap(at_most, group, [column.take(rows) for column in prefer], checked.descending, ids)
            limited[left[out]] = at
        return replace(verdicts, limited=limited, concepts=concepts)

    def _concepts(self, policy: Policy) -> pa.ChunkedArray:
        """The concepts of every sample."""
        found = [signal for signal in self.columns.by_signal if signal.signal == "concepts"]
        if not found:
            raise PolicyError(
                f"{policy.origin}: a balance needs the signal concepts. Add it to the signals to measure."
            )

        def read(shard: ShardRef) -> pa.Table:
            return self.warehouse.read_table(found[0].table(shard), ["concepts"])

        return pa.concat_tables(in_order(read, self.pool.shards, threads=READERS))["concepts"]


def failed_names(failed: NDArray[np.uint64], names: Sequence[str]) -> pa.ListArray:
    """Return the names whose bits are set, in order, as one list a sample."""
    bits = np.uint64(1) << np.arange(len(names), dtype=np.uint64)
    is_failed = (failed[:, None] & bits) != 0
    offsets = np.concatenate([[0], np.cumsum(is_failed.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(names, pa.string()).take(pa.array(np.nonzero(is_failed)[1]))
    )
