"""Whether the pairs at hand are those that a policy's rules ask for, and were looked for as far as these reach."""

import math
from collections.abc import Sequence

from storage.record import read_record
from storage.refs import PairsRef, PoolRef
from storage.warehouse import Warehouse
from tasks.curation.conditions import PolicyError
from tasks.curation.duplicate_joins import Rule
from tasks.curation.policy import CheckedPolicy, Policy


def duplicate_rules(checked: CheckedPolicy, pairs: Sequence[PairsRef], warehouse: Warehouse) -> list[Rule]:
    """Return the policy's duplicate rules. Raises `PolicyError` unless the pairs they need were looked for so far."""
    policy = checked.policy
    rules = []
    for rule, distance, confirm in zip(policy.duplicates, checked.distances, checked.confirmations, strict=True):
        what = f'{policy.origin}: duplicate rule "{rule.name}"'
        for kind in sorted(rule.kinds):
            wanted = distance if kind in rule.pairs or confirm is None else confirm
            _require_pairs(what, kind, wanted, pairs, warehouse)
        rules.append(Rule(rule.pairs, distance, rule.rule, confirm))
    return rules


def require_evaluation(
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


def _reach(pairs: PairsRef, warehouse: Warehouse) -> float:
    """The largest distance that pairs were looked for, as their table's record says; no limit for equal ones."""
    record = read_record(warehouse, pairs.paths[0].removesuffix(".parquet") + ".json") if pairs.paths else None
    return float(record.config.get("max_distance", math.inf)) if record else math.inf
