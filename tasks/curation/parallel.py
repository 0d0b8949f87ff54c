"""Many shards at once, in order, with few in memory."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def in_order(function: Callable[[S], T], values: Sequence[S], *, threads: int) -> Iterator[T]:
    """Yield `function` of each value in order, computed by threads; at most `threads` results wait in memory."""
    with ThreadPoolExecutor(threads) as pool:
        for begin in range(0, len(values), threads):
            yield from pool.map(function, values[begin : begin + threads])
