"""Pillow's grey thumbnail of an image, bit for bit, compiled: in Pillow it takes most of the time of a pHash.

Pillow weighs pixels with 22-bit integers and rounds to 8 bits after each direction (`src/libImaging/Resample.c`). Here
the same integers are summed in float64, exactly, as every sum stays below 2^53; so the compiler may sum in any order.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from numba import njit

Bytes = npt.NDArray[np.uint8]
Weights = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]

_SUPPORT = 3.0
_ONE = 2**22
"""What Pillow's integer weights count as 1."""

_VECTOR = 32
"""Weights are padded with zeros to a multiple of this, so that the compiled sums have no remainder."""


def thumbnail(rgb: Bytes, size: int) -> Bytes:
    """Return what Pillow 13 makes of an RGB image by `convert("L").resize((size, size), LANCZOS)`.

    `rgb` is uint8 of shape (height, width, 3), the result uint8 of shape (size, size). As Pillow rounds after the first
    direction, the order matters: since version 13 it is height first for images much taller than wide, width first
    for all others. Here that holds whichever Pillow is installed.
    """
    grey = np.empty(rgb.shape[:2], np.uint8)
    _to_grey(rgb, grey)
    return thumbnail_of_grey(grey, size, extent=rgb.shape[:2])


def thumbnail_of_grey(grey: Bytes, size: int, *, extent: tuple[float, float]) -> Bytes:
    """Return what Pillow 13 makes of a grey image by `resize((size, size), LANCZOS, box=(0, 0, *extent[::-1]))`.

    `grey` is uint8 of shape (height, width), `extent` (height, width) of the part to be scaled, at its upper left.
    """
    height, width = grey.shape
    is_height_first = height > size and height - size > 2 * (width - size)
    result = np.empty((size, size), np.uint8)
    by_width, by_height = _weights(width, size, extent[1]), _weights(height, size, extent[0])
    _shrink(grey, is_height_first, by_width, by_height, result)
    return result


@njit(nogil=True, cache=True)
def _shrink(grey: Bytes, is_height_first: bool, by_width: Weights, by_height: Weights, result: Bytes) -> None:
    height, width = grey.shape
    size = len(result)
    if is_height_first:
        low = np.empty((width, size), np.uint8)
        _weigh(grey.T, by_height, low)
        _weigh(low.T, by_width, result)
    else:
        narrow = np.empty((height, size), np.uint8)
        _weigh(grey, by_width, narrow)
        _weigh(narrow.T, by_height, result.T)


@njit(nogil=True, cache=True)
def _to_grey(rgb: Bytes, grey: Bytes) -> None:
    """ITU-R 601-2 luma, rounded as Pillow does."""
    for y in range(rgb.shape[0]):
        row = rgb[y].reshape(-1)
        for x in range(rgb.shape[1]):
            grey[y, x] = (row[3 * x] * 19595 + row[3 * x + 1] * 38470 + row[3 * x + 2] * 7471 + 0x8000) >> 16


@njit(nogil=True, cache=True, fastmath=True)
def _weigh(grey: Bytes, weights: Weights, result: Bytes) -> None:
    """Write each row's weighted sums: output x weighs the inputs from `first[x]` on.

    Four rows are summed at once, so that each weight is loaded once for all of them.
    """
    first, factors = weights
    height, width = grey.shape
    taps = factors.shape[1]
    lines = np.zeros((4, width + taps))  # as floats, and as far beyond the row as the padded weights reach
    totals = np.empty(4)
    for top in range(0, height, 4):
        rows = min(4, height - top)  # at the end fewer: the other lines still hold earlier rows and aren't written
        for row in range(rows):
            for x in range(width):
                lines[row, x] = grey[top + row, x]
        for x in range(result.shape[1]):
            begin, end, factor = first[x], first[x] + taps, factors[x]
            a, b, c, d = lines[0, begin:end], lines[1, begin:end], lines[2, begin:end], lines[3, begin:end]
            total_a = total_b = total_c = total_d = _ONE / 2
            for tap in range(taps):
                total_a += a[tap] * factor[tap]
                total_b += b[tap] * factor[tap]
                total_c += c[tap] * factor[tap]
                total_d += d[tap] * factor[tap]
            totals[0], totals[1], totals[2], totals[3] = total_a, total_b, total_c, total_d
            for row in range(rows):
                result[top + row, x] = int(min(max(np.floor(totals[row] / _ONE), 0.0), 255.0))


@lru_cache(maxsize=256)
def _weights(length: int, size: int, extent: float) -> Weights:
    """Return the first input of each of `size` outputs, and its integer weights, of shape (size, taps).

    The outputs divide `extent` of the `length` inputs among them.
    """
    if length == size == extent:  # Pillow leaves that direction alone
        return np.arange(size), np.full((size, 1), float(_ONE))
    scale = extent / size
    stretch = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - _SUPPORT * stretch + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + _SUPPORT * stretch + 0.5).astype(np.int64), length)
    taps = -(-(last - first).max() // _VECTOR) * _VECTOR
    inputs = first[:, None] + np.arange(taps)
    distance = (inputs - centre[:, None] + 0.5) / stretch
    weights = np.where(inputs < last[:, None], np.sinc(distance) * np.sinc(distance / _SUPPORT), 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return first, np.trunc(weights * _ONE + np.copysign(0.5, weights))
