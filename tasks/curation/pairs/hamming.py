"""All pairs of 64-bit codes within a Hamming distance, found by sorting instead of comparing all with all.

The pigeonhole rule makes it exact: cut the bits into `m` blocks, and two codes that differ in at most `d` bits differ
in at most `d` blocks, so they agree on some `m - d` of them and meet when the codes are sorted by those blocks alone.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.curation.pairs.keys import BITS, LONG_RUN, Codes, Indices, Key, Words, bit_entropy, choose_blocks, deal

THREADS = min(4, os.cpu_count() or 1)
CANDIDATES = 1 << 20
"""Pairs looked at together where few codes share a key; some 50 bytes each."""
TILE = 1 << 15
"""Pairs looked at together where many do: what stays in a core's cache."""


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

    Nothing is assumed about the codes. Memory is some 200 bytes a code and the pairs themselves; time is near-linear
    where codes are spread out and quadratic only among codes that agree on most bits. A million random codes take about
    a second at distance 4; time grows steeply with the distance, to about a minute at 8.

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
    found = [Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8))]
    if max_distance and old < len(codes):
        entropy = bit_entropy(codes)
        blocks = choose_blocks(float(entropy.sum()), len(codes), old=old, max_distance=max_distance)
        codes = deal(codes, entropy, blocks)
        keys = [Key(blocks, chosen) for chosen in combinations(range(blocks), blocks - max_distance)]
        with ThreadPoolExecutor(THREADS) as threads:
            found.extend(
                chain.from_iterable(threads.map(lambda key: _near_by_key(codes, old, key, max_distance), keys))
            )
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _near_by_key(codes: Codes, old: int, key: Key, max_distance: int) -> list[Pairs]:
    """Return in parts the near pairs that this key is the one to report."""
    words = Words.sorted(codes, old, key)
    parts = []
    for one, other in _candidates(words, codes, max_distance):
        open_ones = np.flatnonzero(words.may_be_near(one, other, max_distance))
        left, right = words.index(one[open_ones]), words.index(other[open_ones])
        difference = codes[left] ^ codes[right]
        distance = np.bitwise_count(difference)
        hits = np.flatnonzero(distance <= max_distance)
        hits = hits[key.is_first(difference[hits])]
        parts.append(Pairs(left[hits], right[hits], distance[hits]))
    return parts


def _candidates(words: Words, codes: Codes, max_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield pairs of slots with one key, the second one new: all near ones, and some that are not."""
    later, first = words.runs()
    heads = np.flatnonzero(np.diff(first, prepend=-1))
    sizes = np.diff(heads, append=len(first))
    is_long = sizes >= LONG_RUN
    for head, size in zip(heads[is_long], sizes[is_long], strict=True):
        start, end = first[head], later[head] + size
        for one, other in _tiled(codes[words.index(slice(start, end))], end - size - start, max_distance):
            yield start + one, start + other
    is_short = ~np.repeat(is_long, sizes)
    yield from _listed(first[is_short], later[is_short])


def _tiled(codes: Codes, top: int, max_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield the near pairs of codes, as places of an earlier one and of one from `top` on, comparing tile by tile."""
    height = max(1, TILE // len(codes))
    for low in range(top, len(codes), height):
        distance = np.bitwise_count(codes[low : low + height, None] ^ codes[: low + height])
        near = distance - np.uint8(1) < max_distance  # a code and itself: 0 - 1 is 255
        if near.any():
            later, earlier = np.nonzero(near)
            later += low
            is_once = earlier < later
            yield earlier[is_once], later[is_once]


def _listed(first: Indices, later: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield each of `later` slots with every slot from its `first` to itself, `CANDIDATES` at a time."""
    counts = later - first
    total = np.cumsum(counts)
    cuts = np.searchsorted(total, np.arange(0, counts.sum() + CANDIDATES, CANDIDATES), side="right")
    for low, high in pairwise(cuts):
        owners, left = _ragged(first[low:high], counts[low:high])
        yield left, later[low:high][owners]


def _ragged(starts: Indices, counts: Indices) -> tuple[Indices, Indices]:
    """Return the integers of many ranges, `counts` of them from `starts` on: which range each is of, and itself."""
    owners = np.repeat(np.arange(len(starts)), counts)
    return owners, np.arange(len(owners)) + np.repeat(starts - np.cumsum(counts) + counts, counts)
