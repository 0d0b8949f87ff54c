"""ε for a target: how near semantic duplicates must be for a wanted share of a pool to be kept.

SemDeDup runs two values on a tenth of the clusters and interpolates; with the pairs stored, the answer is counted.
"""

import numpy as np
import pyarrow as pa

from storage.refs import PairsRef, PoolRef
from storage.warehouse import Warehouse
from tasks.curation.duplicate_joins import Rule
from tasks.curation.duplicates import choose_survivors, read_evidence
from tasks.curation.policy import Method


def suggest_epsilon(
    pairs: PairsRef, pool: PoolRef, *, keep: float, rule: Method = "greedy", warehouse: Warehouse
) -> float:
    """Return the `max_distance` with which a duplicate rule over `pairs` keeps as near to the share `keep` as any does.

    Counts what the rule would keep of all samples of `pool`, no condition applied and the smaller sample_id preferred,
    at distances of stored pairs, halving the range each time. That is exact where a larger distance keeps fewer, as
    with official and components; greedy may keep a few more now and then. Works for any kind of pairs.
    Raises `ValueError` if `keep` is not a share, or not even the largest stored distance removes enough.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}. Give the share of samples to keep, above 0 and up to 1.")
    parts = [warehouse.read_table(shard.path, ["sample_id"])["sample_id"].chunks for shard in pool.shards]
    ids = pa.chunked_array([chunk for chunks in parts for chunk in chunks], pa.string())
    evidence, positions = read_evidence([pairs], sample_ids=ids, warehouse=warehouse)
    candidates = np.sort(positions[positions >= 0])
    distances = np.unique(np.append(evidence.kinds[pairs.kind].distance, np.float32(0)))

    def kept(place: int) -> float:
        rules = [Rule((pairs.kind,), float(distances[place]), rule)]
        removed = np.count_nonzero(choose_survivors(evidence, rules, candidates=candidates).survivor >= 0)
        return 1 - removed / max(1, len(ids))

    low, high = 0, len(distances) - 1
    if kept(high) > keep:
        raise ValueError(
            f"Not even distance {distances[high]:.3g}, the largest stored, leaves {keep:.1%} of pool {pool.name}: "
            f"{kept(high):.1%} stay. Look for pairs with a larger max_distance, or keep more."
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) <= keep else (middle + 1, high)
    nearer = high > 0 and kept(high - 1) - keep < keep - kept(high)
    return float(distances[high - nearer])
