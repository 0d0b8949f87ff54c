"""The stored form of pairs: complete, and small however many samples are equal.

Equal samples are stored as a star and near groups of them as one row; here it is read, joined and expanded.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from storage.refs import PairsRef
from storage.schema import PAIRS
from storage.warehouse import Warehouse
from tasks.curation.pairs.codes import Indices
from tasks.curation.pairs.hamming import Groups, Pairs


def read_pairs(pairs: PairsRef, warehouse: Warehouse, *, ids: pa.Array | pa.ChunkedArray | None = None) -> pa.Table:
    """Return the pairs in stored form with schema `PAIRS`, each row once, in order.

    With `ids`, only what concerns these samples: a group's star is then centred on its smallest id among them. Give a
    pool's ids to get the pool's pairs alone, since tables may also speak of samples that were beside it at other times.
    The rows are the same whatever the history of the tables was.

    Stored form: samples with equal codes are a group. A table holds a star for each group, from its smallest sample_id
    to every other member at distance 0, and one row for two near groups, between their smallest ids; `expand_pairs`
    says what follows. So n equal images take n - 1 rows. A table of what new samples added is complete by itself: it
    holds the whole star, old members too, of every group with a new member or near a group with one. So tables can be
    read together by joining the groups that share a sample, and samples be left out afterwards.
    """
    evidence = _Evidence.of(warehouse.read_tables(pairs.paths, PAIRS))
    wanted = np.ones(len(evidence.ids), np.bool_)
    if ids is not None:
        wanted = pc.is_in(evidence.ids, value_set=ids).to_numpy(zero_copy_only=False)
    return evidence.stored(np.flatnonzero(wanted))


def expand_pairs(table: pa.Table, *, limit: int = 100_000_000) -> pa.Table:
    """Return every pair of samples that follows from a table in stored form, in order, with schema `PAIRS`.

    Samples that distances of 0 connect are a group: any two of them are at distance 0, and the distance between members
    of two groups is the distance between all members of the two.

    Raises `TooManyPairsError` if there are more than `limit`.
    """
    return _Evidence.of(table).expanded(limit)


@dataclass(frozen=True)
class _Evidence:
    """What tables in stored form say together: samples by ascending id, each one's group, and the near groups."""

    ids: pa.Array
    group: Indices
    near: Pairs

    @classmethod
    def of(cls, table: pa.Table) -> "_Evidence":
        columns = [table["left_id"], table["right_id"]]
        ids = pc.unique(pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string()))
        ids = ids.take(pc.sort_indices(ids))
        left, right = (pc.index_in(column, ids).to_numpy().astype(np.int64) for column in columns)
        distance = table["distance"].to_numpy()
        equal = distance == 0
        links = coo_array((equal[equal], (left[equal], right[equal])), shape=(len(ids), len(ids)))
        group = connected_components(links, directed=False)[1].astype(np.int64)
        return cls(ids, group, _once(Pairs(group[left[~equal]], group[right[~equal]], distance[~equal])))

    def stored(self, wanted: Indices) -> pa.Table:
        """Return the stored form of what concerns the wanted samples, given by position."""
        nobody = len(self.ids)
        centre = np.full(nobody, nobody)
        np.minimum.at(centre, self.group[wanted], wanted)
        others = wanted[centre[self.group[wanted]] != wanted]
        left, right = centre[self.near.left], centre[self.near.right]
        both = (left < nobody) & (right < nobody)
        return self._table(
            Pairs(
                np.r_[centre[self.group[others]], left[both]],
                np.r_[others, right[both]],
                np.r_[np.zeros(len(others), np.float32), self.near.distance[both]],
            )
        )

    def expanded(self, limit: int) -> pa.Table:
        """Return all pairs of samples."""
        sizes = np.bincount(self.group)
        groups = Groups(np.argsort(self.group, kind="stable"), np.cumsum(sizes) - sizes, sizes)
        return self._table(groups.expand(self.near, limit))

    def _table(self, pairs: Pairs) -> pa.Table:
        pairs = _once(pairs)
        return pa.table(
            [self.ids.take(pa.array(pairs.left)), self.ids.take(pa.array(pairs.right)), pairs.distance], schema=PAIRS
        )


def _once(pairs: Pairs) -> Pairs:
    """Return the pairs with left < right, in order, each once."""
    left, right = np.minimum(pairs.left, pairs.right), np.maximum(pairs.left, pairs.right)
    order = np.lexsort((pairs.distance, right, left))
    left, right = left[order], right[order]
    is_first = (np.diff(left, prepend=-1) != 0) | (np.diff(right, prepend=-1) != 0)
    return Pairs(left[is_first], right[is_first], pairs.distance[order][is_first])
