"""64-bit codes, and their bits dealt out so that each band tells as many codes apart.

Real hashes have bits that are nearly always set, and a band of such bits alone would tell nothing.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BITS = 64
CHUNK = 1 << 14
"""Codes worked on at a time: what stays in a core's cache."""

Indices = NDArray[np.int64]
Codes = NDArray[np.uint64]


def deal(codes: Codes, blocks: int) -> Codes:
    """Return the codes with their bits in another order, telling and untelling ones dealt evenly to the blocks."""
    ranked = np.argsort(-_bit_entropy(codes), kind="stable")
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


def _bit_entropy(codes: Codes) -> NDArray[np.float64]:
    """Return what each bit tells codes apart by: -log2 of the chance that two agree on it, over a sample of codes."""
    sample = codes[:: len(codes) // 65536 + 1].astype("<u8").view(np.uint8).reshape(-1, 8)
    share = np.unpackbits(sample, axis=1, bitorder="little").mean(axis=0)
    return np.asarray(-np.log2(share**2 + (1 - share) ** 2))


def _by_chunk(function: Callable[[Codes], Codes], codes: Codes) -> Codes:
    """Return `function` of the codes, computed on as many at a time as stay in a core's cache."""
    result = np.empty_like(codes)
    for start in range(0, len(codes), CHUNK):
        result[start : start + CHUNK] = function(codes[start : start + CHUNK])
    return result
