"""Near 64-bit codes by bands of 16 bits, compiled: multi-index hashing (Norouzi, Punjani and Fleet 2012) as a join.

If two codes differ in at most d bits, then in some band they differ in few; so only codes with near bands are compared.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from math import comb
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from tasks.curation.pairs.codes import Codes, Indices, deal

BANDS, WIDTH = 4, 16
KEYS = 1 << WIDTH
FEW = 8_192
"""Codes up to which all are compared with all: 30 ms."""
PARTS = 16
"""Parts that a band's keys are searched in: a few for each thread, as some have more codes than others."""


class Found(NamedTuple):
    """Pairs of places of codes, and how many bits they differ in."""

    left: Indices
    right: Indices
    distance: NDArray[np.uint8]


def find_near(codes: Codes, old: int, max_distance: int, *, threads: int) -> list[Found]:
    """Return in parts the pairs of codes at up to `max_distance` bits, without pairs of the first `old` codes.

    Each pair is there once, in no order. Few codes are compared all with all, and so are many at distances beyond which
    nearly all bands are near. Memory is some 40 bytes a code.
    """
    flips = sum(comb(WIDTH, bits) for allowance in band_allowances(max_distance) for bits in range(allowance + 1))
    if len(codes) <= FEW or flips > KEYS // 8:
        return _find_by_all(codes, old, max_distance)
    return _find_by_bands(deal(codes, BANDS), old, max_distance, threads)


def band_allowances(max_distance: int) -> list[int]:
    """Return in how many bits each band may differ, -1 for a band that is not looked at.

    If two codes differ in more than its allowance r in every band, they differ in at least the sum of all r + 1 bits.
    That sum is `max_distance` + 1 here, so no near pair is missed, and with less one would be.
    """
    return [(max_distance + 1 + band) // BANDS - 1 for band in range(BANDS)]


def _find_by_all(codes: Codes, old: int, max_distance: int) -> list[Found]:
    """Compare all with all: one band with one key."""
    count, nothing = len(codes), np.zeros(1, np.int64)
    starts, first_new = np.array([0, count]), np.array([old])
    return [Found(*_search(codes, np.arange(count), starts, first_new, nothing, nothing, 0, max_distance, 0, 1))]


def _find_by_bands(codes: Codes, old: int, max_distance: int, threads: int) -> list[Found]:
    """Compare codes that are near in some band; a pair is reported by the first band that it is near in."""
    allowances = np.array(band_allowances(max_distance))
    found: list[Found] = []
    with ThreadPoolExecutor(threads) as pool:
        for band in range(BANDS):
            keys = (codes >> np.uint64(WIDTH * band)).astype(np.uint16)
            order = np.argsort(keys, kind="stable")  # so old codes come first under each key
            starts = np.searchsorted(keys[order], np.arange(KEYS + 1))
            first_new = starts[:-1] + np.bincount(keys[:old], minlength=KEYS)
            flips = _flips(int(allowances[band]))
            cuts = np.searchsorted(starts, np.linspace(0, len(codes), PARTS + 1).astype(np.int64))
            cuts[0], cuts[-1] = 0, KEYS
            tables = (codes[order], order, starts, first_new, flips, allowances, band, max_distance)
            parts = pool.map(partial(_search, *tables), cuts[:-1], cuts[1:])
            found.extend(Found(*part) for part in parts)
    return found


def _flips(allowance: int) -> Indices:
    """Return every way to flip up to so many bits of a band, as numbers to xor with."""
    return np.array(
        [sum(1 << bit for bit in bits) for count in range(allowance + 1) for bits in combinations(range(WIDTH), count)],
        np.int64,
    )


def _count_bits(typing_context: Any, value: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), code


_bits: Any = intrinsic(_count_bits)
"""The set bits of an uint64 in compiled code: one instruction, for which numba has no word."""


@njit(nogil=True, cache=True)
def _search(
    codes: Codes,
    order: Indices,
    starts: Indices,
    first_new: Indices,
    flips: Indices,
    allowances: Indices,
    band: int,
    max_distance: int,
    first_key: int,
    last_key: int,
) -> tuple[Indices, Indices, NDArray[np.uint8]]:
    """Compare the codes under some keys with those under keys a flip away: `codes` sorted by key, `order` their places.

    The codes of a key are from its start to the next, the new ones from `first_new` on.
    """
    left, right, distances = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024, np.uint8)
    limit = np.uint64(max_distance)
    count = 0
    for key in range(first_key, last_key):
        for flip in flips:
            other = key ^ int(flip)
            if other < key or starts[other] == starts[other + 1]:
                continue
            for one in range(starts[key], starts[key + 1]):
                low = starts[other] if one >= first_new[key] else first_new[other]
                if other == key:
                    low = max(one + 1, low)
                hits = 0
                for two in range(low, starts[other + 1]):  # no branch in here, so that several are done at once
                    hits += _bits(codes[one] ^ codes[two]) <= limit
                for two in range(low, starts[other + 1] if hits else low):
                    difference = codes[one] ^ codes[two]
                    if _bits(difference) > limit or _is_near_before(difference, allowances, band):
                        continue
                    if count == len(left):
                        left = np.concatenate((left, np.empty_like(left)))
                        right = np.concatenate((right, np.empty_like(right)))
                        distances = np.concatenate((distances, np.empty_like(distances)))
                    left[count], right[count], distances[count] = order[one], order[two], _bits(difference)
                    count += 1
    return left[:count], right[:count], distances[:count]


@njit(nogil=True, cache=True)
def _is_near_before(difference: np.uint64, allowances: Indices, band: int) -> bool:
    """Whether a pair is near in an earlier band, which is then the one to report it."""
    for earlier in range(band):
        part = difference >> np.uint64(WIDTH * earlier) & np.uint64(KEYS - 1)
        if np.int64(_bits(part)) <= allowances[earlier]:
            return True
    return False
