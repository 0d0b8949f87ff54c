"""The stored form of pairs: complete, and small however many samples are equal.

Equal samples are stored as a star and near groups of them as one row; here it is read, joined and expanded.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
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
    known, (stored,) = encode_pairs([warehouse.read_tables(pairs.paths, PAIRS)])
    wanted = np.ones(len(known), np.bool_)
    if ids is not None:
        wanted = pc.is_in(known, value_set=ids).to_numpy(zero_copy_only=False)
    return _decoded(known, only_wanted(stored, wanted))


def expand_pairs(table: pa.Table, *, limit: int = 100_000_000) -> pa.Table:
    """Return every pair of samples that follows from a table in stored form, in order, with schema `PAIRS`.

    Samples that distances of 0 connect are a group: any two of them are at distance 0, and the distance between members
    of two groups is the distance between all members of the two.

    Raises `TooManyPairsError` if there are more than `limit`.
    """
    ids, (pairs,) = encode_pairs([table])
    group, near = _groups(pairs, len(ids))
    sizes = np.bincount(group)
    groups = Groups(np.argsort(group, kind="stable"), np.cumsum(sizes) - sizes, sizes)
    return _decoded(ids, _once(groups.expand(near, limit)))


def encode_pairs(tables: Sequence[pa.Table]) -> tuple[pa.StringArray, list[Pairs]]:
    """Return the ids that tables speak of, ascending and without repeats, and each table's pairs as places in them."""
    columns = [table[name] for table in tables for name in ("left_id", "right_id")]
    chunks = [chunk for column in columns for chunk in column.chunks]
    encoded = pa.chunked_array(chunks, pa.string()).dictionary_encode().combine_chunks()
    ids = encoded.dictionary
    order = np.asarray(pc.sort_indices(ids))
    place = np.empty(len(ids), np.int64)
    place[order] = np.arange(len(ids))
    sides = np.split(place[np.asarray(encoded.indices)], np.cumsum([len(column) for column in columns]))[:-1]
    pairs = [
        Pairs(left, right, table["distance"].to_numpy())
        for table, left, right in zip(tables, sides[::2], sides[1::2], strict=True)
    ]
    return ids.take(pa.array(order)), pairs


def only_wanted(pairs: Pairs, wanted: NDArray[np.bool_]) -> Pairs:
    """Return the stored form of what pairs say of the wanted samples, given by place."""
    group, near = _groups(pairs, len(wanted))
    nobody, places = len(wanted), np.flatnonzero(wanted)
    centre = np.full(nobody, nobody)
    np.minimum.at(centre, group[places], places)
    others = places[centre[group[places]] != places]
    left, right = centre[near.left], centre[near.right]
    both = (left < nobody) & (right < nobody)
    return _once(
        Pairs(
            np.r_[centre[group[others]], left[both]],
            np.r_[others, right[both]],
            np.r_[np.zeros(len(others), np.float32), near.distance[both]],
        )
    )


def _groups(pairs: Pairs, count: int) -> tuple[Indices, Pairs]:
    """Each sample's group, and the groups that are near each other."""
    equal = pairs.distance == 0
    links = coo_array((equal[equal], (pairs.left[equal], pairs.right[equal])), shape=(count, count))
    group = connected_components(links, directed=False)[1].astype(np.int64)
    return group, _once(Pairs(group[pairs.left[~equal]], group[pairs.right[~equal]], pairs.distance[~equal]))


def _decoded(ids: pa.StringArray, pairs: Pairs) -> pa.Table:
    return pa.table([ids.take(pa.array(pairs.left)), ids.take(pa.array(pairs.right)), pairs.distance], schema=PAIRS)


def _once(pairs: Pairs) -> Pairs:
    """Return the pairs with left < right, in order, each once."""
    left, right = np.minimum(pairs.left, pairs.right), np.maximum(pairs.left, pairs.right)
    order = np.lexsort((pairs.distance, right, left))
    left, right = left[order], right[order]
    is_first = (np.diff(left, prepend=-1) != 0) | (np.diff(right, prepend=-1) != 0)
    return Pairs(left[is_first], right[is_first], pairs.distance[order][is_first])
