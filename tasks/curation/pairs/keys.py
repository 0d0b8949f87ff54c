"""Keys: the bits on which two codes must agree before they are compared, and the words that codes are sorted as.

How many bits a key has decides what a join costs: with few, many far codes share it; with many, there are many keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

BITS = 64
HINTS = 2
"""Blocks beside the key that are sorted along, to tell most far codes apart without looking them up."""
FILTER_BITS = 24
CHUNK = 1 << 14
"""Codes worked on at a time: what stays in a core's cache."""
LONG_RUN = 64
"""From so many codes with one key on, they are compared in tiles."""
KEY_COST, CODE_COST, CANDIDATE_COST, TILE_COST = 1e-4, 50e-9, 60e-9, 15e-9
"""Seconds a key, a code under it, and a pair of codes compared alone or in a tile: only their ratios matter."""

Indices = NDArray[np.int64]
Codes = NDArray[np.uint64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Key:
    """The blocks, out of `blocks` equal ones, on which codes must agree to be compared."""

    blocks: int
    chosen: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bits in the chosen blocks."""
        return sum(width for _, width in map(self._span, self.chosen))

    def words(self, codes: Codes) -> Codes:
        """Return, from the highest bit down, each code's chosen blocks, a 0, and `HINTS` other blocks if they fit."""
        words, place = np.zeros_like(codes), BITS
        others = [block for block in range(self.blocks) if block not in self.chosen][:HINTS]
        for blocks in (self.chosen, others):
            for low, width in map(self._span, blocks):
                place -= width
                if place >= 0:
                    words |= (codes >> np.uint64(low) & np.uint64((1 << width) - 1)) << np.uint64(place)
            place -= 1
        return words

    def is_first(self, difference: Codes) -> Mask:
        """Whether, of all keys under which a pair meets, this is the one to report it, from the bits that differ.

        That is the key of the lowest blocks the pair agrees on: it differs in every other block below their highest.
        """
        first = np.ones(len(difference), np.bool_)
        for block in set(range(max(self.chosen, default=0))) - set(self.chosen):
            low, width = self._span(block)
            first &= difference & np.uint64((1 << width) - 1 << low) != 0
        return first

    def _span(self, block: int) -> tuple[int, int]:
        """Return the lowest bit and the width of a block; the first blocks are the widest."""
        width, wider = divmod(BITS, self.blocks)
        return block * width + min(block, wider), width + (block < wider)


@dataclass(frozen=True)
class Words:
    """A sorted word for each code: its key, a bit that says it is new, some of its other bits, and its index."""

    values: Codes
    key_bits: int
    index_bits: int

    @classmethod
    def sorted(cls, codes: Codes, old: int, key: Key) -> "Words":
        """Return the words of all new codes, and of those old codes whose key some new code may have."""
        index_bits = (len(codes) - 1).bit_length()
        values = _by_chunk(key.words, codes)
        values &= np.uint64((1 << BITS) - (1 << index_bits))
        values |= np.arange(len(codes), dtype=np.uint64)
        values[old:] |= np.uint64(1 << BITS - 1 - key.width)
        if old:
            bits = min(key.width, FILTER_BITS)
            begins = values >> np.uint64(BITS - bits)
            taken = np.zeros(1 << bits, np.bool_)
            taken[begins[old:]] = True
            values = values[taken[begins]]
        values.sort()
        return cls(values, key.width, index_bits)

    def index(self, slots: Indices | slice) -> Indices:
        """Return the indices of the codes in some slots."""
        return (self.values[slots] & np.uint64((1 << self.index_bits) - 1)).view(np.int64)

    def may_be_near(self, one: Indices, other: Indices, max_distance: int) -> Mask:
        """Whether the bits at hand leave it open that the codes in two slots are near: most far ones end here."""
        at_hand = np.uint64((1 << BITS - 1 - self.key_bits) - (1 << self.index_bits))
        return np.asarray(np.bitwise_count((self.values[one] ^ self.values[other]) & at_hand) <= max_distance)

    def runs(self) -> tuple[Indices, Indices]:
        """Return the slots of new codes that continue a run of one key, and for each the run's first slot.

        The old codes of a run come first, so a new code is to be compared with all before it.
        """
        later = np.flatnonzero(self.values[1:] ^ self.values[:-1] <= np.uint64((1 << BITS - self.key_bits) - 1)) + 1
        begins = np.diff(later, prepend=-1) > 1
        first = (later[begins] - 1)[np.cumsum(begins) - 1]
        is_new = self.values[later] & np.uint64(1 << BITS - 1 - self.key_bits) != 0
        return later[is_new], first[is_new]


def choose_blocks(entropy: float, count: int, *, old: int, max_distance: int) -> int:
    """Return into how many blocks to cut the bits: more blocks mean longer keys, so fewer candidates, but more keys."""

    def cost(blocks: int) -> float:
        share = 2 ** (-entropy * (blocks - max_distance) / blocks)
        compared = (count**2 - old**2) / 2 * share * (TILE_COST if count * share > LONG_RUN else CANDIDATE_COST)
        return comb(blocks, max_distance) * (KEY_COST + CODE_COST * count + compared)

    def fits(blocks: int) -> bool:
        return Key(blocks, tuple(range(blocks - max_distance))).width < BITS - (count - 1).bit_length()

    return min(filter(fits, range(max_distance, min(max_distance + 6, BITS) + 1)), key=cost)


def bit_entropy(codes: Codes) -> NDArray[np.float64]:
    """Return what each bit tells codes apart by: -log2 of the chance that two agree on it, over a sample of codes."""
    sample = codes[:: len(codes) // 65536 + 1].astype("<u8").view(np.uint8).reshape(-1, 8)
    share = np.unpackbits(sample, axis=1, bitorder="little").mean(axis=0)
    return np.asarray(-np.log2(share**2 + (1 - share) ** 2))


def deal(codes: Codes, entropy: NDArray[np.float64], blocks: int) -> Codes:
    """Return the codes with their bits in another order, telling and untelling ones dealt evenly to the blocks."""
    ranked = np.argsort(-entropy, kind="stable")
    place = np.empty(BITS, np.uint64)
    place[ranked[np.argsort(np.arange(BITS) % blocks, kind="stable")]] = np.arange(BITS)
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.uint64)
    tables = [(bits << place[low : low + 8]).sum(axis=1, dtype=np.uint64) for low in range(0, BITS, 8)]

    def dealt(codes: Codes) -> Codes:
        result = np.zeros_like(codes)
        for byte, table in enumerate(tables):
            result |= table[codes >> np.uint64(8 * byte) & np.uint64(255)]
        return result

    return _by_chunk(dealt, codes)


def _by_chunk(function: Callable[[Codes], Codes], codes: Codes) -> Codes:
    """Return `function` of the codes, computed on as many at a time as stay in a core's cache."""
    result = np.empty_like(codes)
    for start in range(0, len(codes), CHUNK):
        result[start : start + CHUNK] = function(codes[start : start + CHUNK])
    return result
