"""All pairs of 64-bit codes within a Hamming distance, found by sorting instead of comparing all with all.

The pigeonhole rule makes it exact: cut the bits into `m` blocks, and two codes that differ in at most `d` bits differ
in at most `d` blocks, so they agree on some `m - d` of them and meet when the codes are sorted by those blocks alone.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, combinations, pairwise
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BITS = 64
INDEX_BITS = 32
"""What is sorted are words with a key in the upper half and the code's index in the lower: at most 2**32 codes."""
ONE_KEY = np.uint64(1 << INDEX_BITS)
"""Words with the same key differ by less than this."""
FILTER_BITS = 24
CHUNK = 1 << 14
CANDIDATES = 1 << 20
TILE = 1 << 15
THREADS = min(4, os.cpu_count() or 1)
LONG_RUN = 64
"""From this many codes on a run is compared in tiles of `TILE` pairs, which stay in a core's cache."""
KEY_COST, CODE_COST, CANDIDATE_COST = 1e-4, 25e-9, 8e-9
"""Seconds for one key, for each code under it, and for each candidate pair: only their ratios matter, and not much."""

Indices = NDArray[np.int64]
Codes = NDArray[np.uint64]
Mask = NDArray[np.bool_]


class Pairs(NamedTuple):
    """Pairs of indices, and how many bits differ (0–64)."""

    left: Indices
    right: Indices
    distance: NDArray[np.uint8]


class TooManyPairsError(ValueError):
    """Equal items imply more pairs than can be listed; the message says how many."""


def hamming_pairs(codes: Codes, *, max_distance: int = 4, new_from: int = 0, limit: int = 100_000_000) -> Pairs:
    """Return every pair of codes that differ in at most `max_distance` bits and no other, `left < right`, in order.

    With `new_from=k`, only pairs with at least one index from `k` on: what `codes[k:]` adds to what is known of
    `codes[:k]`, without comparing those with each other.

    Nothing is assumed about the codes. Memory is some 100 bytes a code and the pairs themselves; time is near-linear
    where codes are spread out and quadratic only among codes that agree on most bits. A million random codes take under
    a second at distance 4; time grows steeply with the distance.

    Equal codes are compared once but listed in full, n(n-1)/2 pairs for n of them: raises `TooManyPairsError` if that
    makes more than `limit` pairs. Raises `ValueError` if `codes` is not a flat array of uint64.
    """
    if codes.ndim != 1 or codes.dtype != np.uint64 or len(codes) > 1 << INDEX_BITS:
        raise ValueError(f"codes are {codes.dtype} of shape {codes.shape}. Give a flat array of at most 2**32 uint64.")
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
        entropy = _bit_entropy(codes)
        blocks = _choose_blocks(float(entropy.sum()), len(codes), old, max_distance)
        codes = _dealt(codes, entropy, blocks)
        keys = [Key(blocks, chosen) for chosen in combinations(range(blocks), blocks - max_distance)]
        with ThreadPoolExecutor(THREADS) as threads:
            found.extend(
                chain.from_iterable(threads.map(lambda key: _near_by_key(codes, old, key, max_distance), keys))
            )
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@dataclass(frozen=True)
class Key:
    """The blocks, out of `blocks` equal ones, on which codes must agree to be compared."""

    blocks: int
    chosen: tuple[int, ...]

    def of(self, codes: Codes) -> Codes:
        """Return each code's chosen blocks side by side, the first 32 bits of them."""
        key = np.zeros_like(codes)
        for low, width in map(self._span, self.chosen):
            key = key << np.uint64(width) | codes >> np.uint64(low) & np.uint64((1 << width) - 1)
        return key >> np.uint64(max(0, self.width - INDEX_BITS))

    @property
    def width(self) -> int:
        """Bits in the chosen blocks."""
        return sum(width for _, width in map(self._span, self.chosen))

    def is_first(self, difference: Codes) -> Mask:
        """Whether, of all keys under which a pair meets, this is the one to report it, from the bits that differ.

        The one is made of the lowest blocks the pair agrees on: it agrees on all chosen blocks, and on no other block
        below the highest of them.
        """
        first = np.ones(len(difference), np.bool_)
        for block in range(max(self.chosen, default=-1) + 1):
            low, width = self._span(block)
            agrees = difference & np.uint64((1 << width) - 1 << low) == 0
            first &= agrees if block in self.chosen else ~agrees
        return first

    def _span(self, block: int) -> tuple[int, int]:
        """Return the lowest bit and the width of a block."""
        width, wider = divmod(BITS, self.blocks)
        return block * width + min(block, wider), width + (block < wider)


def _near_by_key(codes: Codes, old: int, key: Key, max_distance: int) -> list[Pairs]:
    """Return in parts the near pairs that this key is the one to report."""
    words = _words(codes, old, key)
    words.sort()
    parts = []
    for left, right in _candidates(words, codes, old, max_distance):
        difference = codes[left] ^ codes[right]
        distance = np.bitwise_count(difference)
        hits = np.flatnonzero(distance <= max_distance)
        hits = hits[key.is_first(difference[hits])]
        parts.append(Pairs(left[hits], right[hits], distance[hits]))
    return parts


def _words(codes: Codes, old: int, key: Key) -> Codes:
    """Return key and index of every new code, and of those old codes whose key some new code may have."""
    keys, index = _by_chunk(key.of, codes), np.arange(len(codes), dtype=np.uint64)
    if old:
        width = min(key.width, INDEX_BITS)
        slots = keys >> np.uint64(max(0, width - FILTER_BITS))
        taken = np.zeros(1 << min(width, FILTER_BITS), np.bool_)
        taken[slots[old:]] = True
        wanted = taken[slots]
        keys, index = keys[wanted], index[wanted]
    keys <<= np.uint64(INDEX_BITS)
    keys |= index
    return keys


def _candidates(words: Codes, codes: Codes, old: int, max_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield index pairs of sorted words with one key, the right one new: all near ones, and some that are not.

    Indices ascend within a run of one key, so a new code is compared with all that come before it in its run.
    """
    later = np.flatnonzero(words[1:] ^ words[:-1] < ONE_KEY) + 1
    begins = np.diff(later, prepend=-1) > 1
    first = (later[begins] - 1)[np.cumsum(begins) - 1]
    if old:
        is_new = _index(words[later]) >= old
        first, later = first[is_new], later[is_new]
    heads = np.flatnonzero(np.diff(first, prepend=-1))
    sizes = np.diff(heads, append=len(first))
    is_long = sizes >= LONG_RUN
    for head, size in zip(heads[is_long], sizes[is_long], strict=True):
        index = _index(words[first[head] : later[head] + size])
        yield from _tiled(codes[index], index, len(index) - size, max_distance)
    is_short = ~np.repeat(is_long, sizes)
    for left, right in _listed(first[is_short], later[is_short]):
        yield _index(words[left]), _index(words[right])


def _tiled(codes: Codes, index: Indices, top: int, max_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield the near index pairs of a run that end in one of its codes from `top` on."""
    height = max(1, TILE // len(codes))
    for low in range(top, len(codes), height):
        distance = np.bitwise_count(codes[low : low + height, None] ^ codes[: low + height])
        near = distance - np.uint8(1) < max_distance  # a code and itself: 0 - 1 is 255
        if near.any():
            right, left = np.nonzero(near)
            right += low
            earlier = left < right
            yield index[left[earlier]], index[right[earlier]]


def _listed(first: Indices, later: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield each of `later` slots with every slot from its `first` to itself, `CANDIDATES` at a time."""
    counts = later - first
    total = np.cumsum(counts)
    cuts = np.searchsorted(total, np.arange(0, counts.sum() + CANDIDATES, CANDIDATES), side="right")
    for low, high in pairwise(cuts):
        owners, left = _ragged(first[low:high], counts[low:high])
        yield left, later[low:high][owners]


def _index(words: Codes) -> Indices:
    return (words & np.uint64((1 << INDEX_BITS) - 1)).view(np.int64)


def _by_chunk(function: Callable[[Codes], Codes], codes: Codes) -> Codes:
    """Return `function` of the codes, computed on as many at a time as stay in a core's cache."""
    result = np.empty_like(codes)
    for start in range(0, len(codes), CHUNK):
        result[start : start + CHUNK] = function(codes[start : start + CHUNK])
    return result


def _ragged(starts: Indices, counts: Indices) -> tuple[Indices, Indices]:
    """Return the integers of many ranges, `counts` of them from `starts` on: which range each is of, and itself."""
    owners = np.repeat(np.arange(len(starts)), counts)
    return owners, np.arange(len(owners)) + np.repeat(starts - np.cumsum(counts) + counts, counts)


def _choose_blocks(entropy: float, count: int, old: int, max_distance: int) -> int:
    """Return into how many blocks to cut the bits: more blocks mean longer keys, so fewer candidates, but more keys."""

    def cost(blocks: int) -> float:
        agreeing = min(INDEX_BITS, entropy * (blocks - max_distance) / blocks)
        candidates = (count**2 - old**2) / 2 / 2**agreeing
        return comb(blocks, max_distance) * (KEY_COST + CODE_COST * count + CANDIDATE_COST * candidates)

    return min(range(max_distance, min(max_distance + 6, BITS) + 1), key=cost)


def _bit_entropy(codes: Codes) -> NDArray[np.float64]:
    """Return what each bit tells codes apart by: -log2 of the chance that two agree on it, over a sample of codes."""
    sample = codes[:: len(codes) // 65536 + 1].astype("<u8").view(np.uint8).reshape(-1, 8)
    share = np.unpackbits(sample, axis=1, bitorder="little").mean(axis=0)
    return np.asarray(-np.log2(share**2 + (1 - share) ** 2))


def _dealt(codes: Codes, entropy: NDArray[np.float64], blocks: int) -> Codes:
    """Return the codes with their bits in another order, telling and untelling ones dealt evenly to the blocks."""
    ranked = np.argsort(-entropy, kind="stable")
    place = np.empty(BITS, np.uint64)
    place[ranked[np.argsort(np.arange(BITS) % blocks, kind="stable")]] = np.arange(BITS)
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.uint64)
    tables = [(bits << place[low : low + 8]).sum(axis=1, dtype=np.uint64) for low in range(0, BITS, 8)]

    def deal(codes: Codes) -> Codes:
        dealt = np.zeros_like(codes)
        for byte, table in enumerate(tables):
            dealt |= table[codes >> np.uint64(8 * byte) & np.uint64(255)]
        return dealt

    return _by_chunk(deal, codes)
