"""All pairs of 64-bit codes within a Hamming distance, equal codes compared once.

Exact: every pair within the distance is found, and no other.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.curation.pairs.bands import Found, find_near
from tasks.curation.pairs.codes import BITS, Codes, Indices

THREADS = min(4, os.cpu_count() or 1)


class Pairs(NamedTuple):
    """Pairs of indices, and how far they are from each other: bits that differ (0–64), or 1 - cosine."""

    left: Indices
    right: Indices
    distance: NDArray[np.uint8] | NDArray[np.float32]


class TooManyPairsError(ValueError):
    """Equal items imply more pairs than can be listed; the message says how many."""


def hamming_pairs(codes: Codes, *, max_distance: int = 4, new_from: int = 0, limit: int = 100_000_000) -> Pairs:
    """Return every pair of codes that differ in at most `max_distance` bits and no other, `left < right`, in order.

    With `new_from=k`, only pairs with at least one index from `k` on: what `codes[k:]` adds to what is known of
    `codes[:k]`, without comparing those with each other.

    Nothing is assumed about the codes. Memory is some 200 bytes a code and the pairs themselves. Time is quadratic
    among codes that agree on most bits, and a small share of that where codes are spread out: `benchmarks/pairs.py`
    has the times of a million random codes at distances 4 and 10.

    Equal codes are compared once but listed in full, n(n-1)/2 pairs for n of them: raises `TooManyPairsError` if that
    makes more than `limit` pairs, old ones counted. Raises `ValueError` if `codes` is not a flat array of uint64.
    """
    if codes.ndim != 1 or codes.dtype != np.uint64 or len(codes) > 2**31:
        raise ValueError(f"codes are {codes.dtype} of shape {codes.shape}. Give a flat array of at most 2**31 uint64.")
    if not 0 <= max_distance <= BITS:
        raise ValueError(f"max_distance is {max_distance}. Use 0 to {BITS} bits.")
    members = np.argsort(codes)
    ordered = codes[members]
    starts = np.flatnonzero(np.r_[np.ones(len(codes[:1]), np.bool_), ordered[1:] != ordered[:-1]])
    groups = Groups(members, starts, np.diff(np.r_[starts, len(codes)]))
    is_new = np.logical_or.reduceat(members >= new_from, starts) if len(codes) else np.zeros(0, np.bool_)
    old_first = np.argsort(is_new, kind="stable")
    near = _near(ordered[starts[old_first]], int(np.count_nonzero(~is_new)), max_distance)
    found = groups.expand(Pairs(old_first[near.left], old_first[near.right], near.distance), limit)
    left, right = np.minimum(found.left, found.right), np.maximum(found.left, found.right)
    wanted = np.flatnonzero(right >= new_from)
    order = wanted[np.lexsort((right[wanted], left[wanted]))]
    return Pairs(left[order], right[order], found.distance[order])


@dataclass(frozen=True)
class Groups:
    """Items in groups of equal ones: group `g` is `members[starts[g] : starts[g] + sizes[g]]`."""

    members: Indices
    starts: Indices
    sizes: Indices

    def expand(self, near: Pairs, limit: int) -> Pairs:
        """Return all pairs of items that follow from `near`, pairs of groups: within each group, and across each pair.

        Each is listed once, in no particular order. Raises `TooManyPairsError` if there are more than `limit`.
        """
        within = int((self.sizes * (self.sizes - 1) // 2).sum())
        total = within + int((self.sizes[near.left] * self.sizes[near.right]).sum())
        if total > limit:
            raise TooManyPairsError(
                f"{total:,} pairs follow from {len(self.members):,} items, {within:,} of them between equal items; "
                f"the limit is {limit:,}. Work with the stored pairs, which hold each group once, or raise the limit."
            )
        repeated = np.flatnonzero(self.sizes > 1)
        owners, slots = _ragged(self.starts[repeated], self.sizes[repeated])
        ends = (self.starts + self.sizes)[repeated][owners]
        owners, rights = _ragged(slots + 1, ends - slots - 1)
        lefts = slots[owners]
        rows, left = _ragged(self.starts[near.left], self.sizes[near.left])
        owners, right = _ragged(self.starts[near.right][rows], self.sizes[near.right][rows])
        return Pairs(
            self.members[np.r_[lefts, left[owners]]],
            self.members[np.r_[rights, right]],
            np.r_[np.zeros(within, np.uint8), near.distance[rows[owners]]],
        )


def _near(codes: Codes, old: int, max_distance: int) -> Pairs:
    """Return the pairs of distinct codes at 1 to `max_distance` bits, leaving out pairs of the first `old` codes."""
    found = [Found(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8))]
    if max_distance and old < len(codes):
        found += find_near(codes, old, max_distance, threads=THREADS)
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _ragged(starts: Indices, counts: Indices) -> tuple[Indices, Indices]:
    """Return the integers of many ranges, `counts` of them from `starts` on: which range each is of, and itself."""
    owners = np.repeat(np.arange(len(starts)), counts)
    return owners, np.arange(len(owners)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
