"""Decontamination: which samples of a pool are copies of samples that a model is to be evaluated on.

Pools and evaluation sets are compared by the same pairs as duplicates are, so nothing is measured for it twice.
"""

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.refs import PairsRef, PoolRef, ShardRef
from storage.schema import SAMPLES
from storage.warehouse import Warehouse
from tasks.curation.duplicate_joins import Edges
from tasks.curation.duplicates import read_evidence
from tasks.curation.parallel import in_order

READERS = 8
NOBODY = np.iinfo(np.int64).max


def beside(pool: PoolRef, evaluation: Collection[PoolRef]) -> PoolRef:
    """Return the pool together with evaluation pools, to look for pairs in; a shard in several counts once."""
    shards = {shard.name: shard for other in (pool, *evaluation) for shard in other.shards}
    return PoolRef(pool.name, tuple(shards[name] for name in sorted(shards)))


def read_ids(pools: Collection[PoolRef], warehouse: Warehouse) -> pa.ChunkedArray:
    """Return the ids of all samples of some pools."""

    def read(shard: ShardRef) -> pa.ChunkedArray:
        return warehouse.read_table(shard.path, ["sample_id"])["sample_id"]

    shards = [shard for pool in pools for shard in pool.shards]
    columns = list(in_order(read, shards, threads=READERS))
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], SAMPLES.field("sample_id").type)


def find_contamination(
    sample_ids: pa.ChunkedArray,
    evaluation_ids: pa.ChunkedArray,
    pairs: Sequence[PairsRef],
    *,
    max_distance: float,
    warehouse: Warehouse,
) -> pa.StringArray:
    """Return the evaluation sample that each sample is a copy of, the nearest within `max_distance`, or null.

    Of equally near ones it is that with the smallest id. `pairs` must cover the pool beside the evaluation pools (see
    `beside`). A sample that is itself in an evaluation pool is its own copy.
    """
    every = pa.chunked_array([*sample_ids.chunks, *evaluation_ids.chunks], sample_ids.type)
    evidence, _ = read_evidence(pairs, sample_ids=every, warehouse=warehouse)
    is_evaluation = np.zeros(len(evidence.ids), bool)
    positions = evidence.find(evaluation_ids)
    is_evaluation[positions[positions >= 0]] = True
    nearest = np.full((2, len(evidence.ids)), np.inf)  # distance, position of the evaluation sample
    for edges in evidence.kinds.values():
        found = _nearest(edges, is_evaluation, max_distance)
        is_nearer = (found[0] < nearest[0]) | ((found[0] == nearest[0]) & (found[1] < nearest[1]))
        nearest[:, is_nearer] = found[:, is_nearer]
    own = evidence.find(sample_ids)
    by_pair = np.where(own >= 0, np.append(nearest[1], np.inf)[own], np.inf)
    is_copy = np.isfinite(by_pair)
    names = evidence.ids.take(pa.array(np.where(is_copy, by_pair, 0).astype(np.int64), mask=~is_copy))
    is_itself = pc.is_in(sample_ids, value_set=evaluation_ids.combine_chunks())
    return pc.if_else(is_itself, sample_ids, names).combine_chunks()


def _nearest(edges: Edges, is_evaluation: NDArray[np.bool_], max_distance: float) -> NDArray[np.float64]:
    """By position, the distance and position of the nearest evaluation sample in its own or a near group."""
    count = len(is_evaluation)
    group = edges.groups(count)
    first = np.full(int(group.max(initial=-1)) + 1, NOBODY)  # of each group, the evaluation sample with the smallest id
    places = np.flatnonzero(is_evaluation)
    np.minimum.at(first, group[places], places)
    near = (edges.distance > 0) & (edges.distance <= max_distance)
    one, other = group[edges.left[near]], group[edges.right[near]]
    distance = np.concatenate([np.zeros(len(first)), np.tile(edges.distance[near].astype(np.float64), 2)])
    start = np.concatenate([np.arange(len(first)), one, other])
    found = np.concatenate([first, first[other], first[one]])
    known = found != NOBODY
    order = np.lexsort((found[known], distance[known], start[known]))
    starts, at = np.unique(start[known][order], return_index=True)
    best = np.full((2, len(first)), np.inf)
    best[0, starts] = distance[known][order][at]
    best[1, starts] = found[known][order][at]
    return best[:, group]
