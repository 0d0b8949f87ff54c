"""Pillow's Lanczos reduction of a grey image to a small square, bit for bit, as a few matrix products.

Pillow (`src/libImaging/Resample.c`) weighs pixels with 22-bit integers and rounds to 8 bits after each direction. Sums
of such products stay below 2^53, so float64 matrix products are exact and far faster than its scalar loops.
"""

import threading
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_SUPPORT = 3.0
_PRECISION_BITS = 22
_GROUPS = 4
_PRODUCT = 2**18
"""Multiplications in one matrix product: above it OpenBLAS would start threads of its own, and a strip leaves L2."""


def shrink(grey: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return what Pillow 13's `resize((size, size), LANCZOS)` makes of `grey`, uint8 of shape (height, width).

    Pillow rounds after the first direction, so the order matters: since version 13 it is height first for images
    much taller than wide, width first for all others. Here that holds whichever Pillow is installed.
    """
    height, width = grey.shape
    is_tall = height > size and height - size > 2 * (width - size)
    return _shrink_width_first(grey.T, size).T if is_tall else _shrink_width_first(grey, size)


def _shrink_width_first(grey: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    height, width = grey.shape
    columns = grey.astype(np.float64) if width == size else _weighted_columns(grey, size)
    if height == size:
        return columns.astype(np.uint8)
    rows = np.empty((size, size))
    for at, taps, weights in _weights(height, size):
        rows[at] = weights.T @ columns[taps]
    return _rounded(rows).astype(np.uint8)


def _weighted_columns(grey: npt.NDArray[np.uint8], size: int) -> Floats:
    """Reduce the width, a strip of rows at a time."""
    height, width = grey.shape
    groups = _weights(width, size)
    widest = max(weights.size for _, _, weights in groups)
    strip = min(height, max(1, _PRODUCT // widest))
    buffer = _scratch.of(strip * width).reshape(strip, width)
    result = np.empty((height, size))
    for top in range(0, height, strip):
        part = grey[top : top + strip]
        values = buffer[: len(part)]
        np.copyto(values, part)
        for at, taps, weights in groups:
            result[top : top + strip, at] = values[:, taps] @ weights
    return _rounded(result)


def _rounded(sums: Floats) -> Floats:
    """Scale sums of 22-bit weights back to 8 bits as Pillow does: half up, then clipped."""
    sums += 1 << (_PRECISION_BITS - 1)
    sums *= 2.0**-_PRECISION_BITS
    np.floor(sums, out=sums)
    return np.clip(sums, 0, 255, out=sums)


@lru_cache(maxsize=256)
def _weights(length: int, size: int) -> tuple[tuple[slice, slice, Floats], ...]:
    """Return groups of outputs: where they are, the inputs they need, and the weights of shape (inputs, outputs).

    A group of neighbours shares most inputs, so the products skip nearly all of the matrix that is zero.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - _SUPPORT * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + _SUPPORT * stretch + 0.5).astype(np.int64), length)
    groups = []
    for part in np.array_split(np.arange(size), _GROUPS):
        begin, end = int(first[part[0]]), int(last[part[-1]])
        taps = np.arange(begin, end)[:, None]
        weights = _lanczos((taps - centre[part] + 0.5) / stretch)
        weights[(taps < first[part]) | (taps >= last[part])] = 0
        weights /= weights.sum(axis=0)
        whole = np.trunc(weights * (1 << _PRECISION_BITS) + np.copysign(0.5, weights))
        groups.append((slice(int(part[0]), int(part[-1]) + 1), slice(begin, end), whole))
    return tuple(groups)


def _lanczos(x: Floats) -> Floats:
    return np.where((x >= -_SUPPORT) & (x < _SUPPORT), np.sinc(x) * np.sinc(x / _SUPPORT), 0.0)


class _Scratch(threading.local):
    """Memory that a thread uses again: fresh pages cost more than the arithmetic on them."""

    kept: Floats = np.empty(0)

    def of(self, size: int) -> Floats:
        if self.kept.size < size:
            self.kept = np.empty(size)
        return self.kept[:size]


_scratch = _Scratch()
