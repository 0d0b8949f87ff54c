"""Limits: what a policy leaves out last, of what conditions and duplicates have left: too much of the same.

A cap keeps the best of each group; a balance draws samples so that frequent concepts come down to a count (MetaCLIP).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.curation.conditions import locked_connection
from tasks.curation.policy import Balance

NONE = -1


@dataclass(frozen=True)
class ConceptCount:
    """Samples that mention a concept, before and after a balance."""

    concept: str
    before: int
    after: int


def over_cap(
    at_most: int,
    group: pa.ChunkedArray,
    preferences: Sequence[pa.ChunkedArray],
    descending: Sequence[bool],
    ids: pa.Array,
) -> NDArray[np.bool_]:
    """Return which samples are not among the `at_most` best of their group, ties by id. NULL is a group like others."""
    columns = {f"by{at}": column for at, column in enumerate(preferences)}
    order = [f"by{at} {'DESC' if down else 'ASC'} NULLS LAST" for at, down in enumerate(descending)]
    with locked_connection() as connection:
        connection.register("samples", pa.table({"place": np.arange(len(ids)), "grp": group, "id": ids, **columns}))
        over = connection.sql(
            "SELECT place FROM samples QUALIFY row_number() "
            f"OVER (PARTITION BY grp ORDER BY {', '.join([*order, 'id'])}) > {at_most}"
        ).fetchnumpy()["place"]
    mask = np.zeros(len(ids), bool)
    mask[over] = True
    return mask


def draw_balanced(
    balance: Balance, at_most: int, concepts: pa.ListArray, group: pa.Array | None, ids: pa.Array
) -> tuple[NDArray[np.bool_], list[ConceptCount]]:
    """Return which samples a balance leaves out, and the counts of all concepts before and after.

    A concept that `count` samples mention is drawn with p = min(1, t / count), and a sample stays if any of its
    concepts is drawn: with 1 - Π(1 - p), against a number in [0, 1) made of its id and the seed. So the choice is the
    same on every machine, and a sample's own fate changes with its concepts' counts only. Samples that mention nothing
    go, unless `keep_unmatched`. In each group counts are its own; t is `at_most`, or with `tail_of` what makes the
    group's share of rare concepts equal that group's (MetaCLIP 2, arXiv:2507.22062).
    """
    lists = concepts.combine_chunks() if isinstance(concepts, pa.ChunkedArray) else concepts
    encoded = pc.dictionary_encode(lists.flatten())
    names = encoded.dictionary.to_pylist()
    lengths = np.asarray(pc.fill_null(pc.list_value_length(lists), 0), np.int64)
    sample = np.repeat(np.arange(len(ids)), lengths)
    concept = np.asarray(encoded.indices, np.int64)
    groups, group_names = _encode(group, len(ids))
    counts = np.bincount(groups[sample] * len(names) + concept, minlength=len(group_names) * len(names))
    counts = counts.reshape(len(group_names), len(names))
    limits = _limits(counts, group_names, at_most, balance.tail_of)
    chance = np.minimum(1, limits[:, None] / np.maximum(counts, 1))
    spared = np.zeros(len(ids))
    with np.errstate(divide="ignore"):
        np.add.at(spared, sample, np.log1p(-chance[groups[sample], concept]))
    kept = uniform(ids, balance.seed) < -np.expm1(spared)
    if balance.keep_unmatched:
        kept |= lengths == 0
    after = np.bincount(concept[kept[sample]], minlength=len(names))
    rows = zip(names, counts.sum(axis=0).tolist(), after.tolist(), strict=True)
    return ~kept, sorted((ConceptCount(*row) for row in rows), key=lambda row: (-row.before, row.concept))


def uniform(ids: pa.Array | pa.ChunkedArray, seed: int) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each id: the first 53 bits of sha256 over seed and id."""
    digests = (hashlib.sha256(f"{seed}:{name}".encode()).digest() for name in ids.to_pylist())
    return np.array([(int.from_bytes(digest[:8], "big") >> 11) / 2**53 for digest in digests])


def _encode(group: pa.Array | None, count: int) -> tuple[NDArray[np.int64], list[str | None]]:
    if group is None:
        return np.zeros(count, np.int64), [None]
    encoded = group.combine_chunks() if isinstance(group, pa.ChunkedArray) else group
    encoded = encoded.dictionary_encode("encode")
    return np.asarray(encoded.indices, np.int64), encoded.dictionary.to_pylist()


def _limits(
    counts: NDArray[np.int64], groups: list[str | None], at_most: int, tail_of: str | None
) -> NDArray[np.float64]:
    """Each group's t."""
    limits = np.full(len(groups), float(at_most))
    if tail_of is None or tail_of not in groups:
        return limits
    reference = counts[groups.index(tail_of)]
    tail = reference[reference < at_most].sum() / max(1, reference.sum())
    for at, name in enumerate(groups):
        if name != tail_of and counts[at].sum():
            ascending = np.sort(counts[at][counts[at] > 0])
            share = np.cumsum(ascending) / ascending.sum()
            limits[at] = ascending[np.searchsorted(share, tail)] if tail < 1 else ascending[-1]
    return limits
