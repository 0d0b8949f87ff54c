"""Many shards at once, in order, with few in memory."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def in_order(function: Callable[[S], T], values: Sequence[S], *, threads: int) -> Iterator[T]:
    """Yield `function` of each value in order, computed by threads; at most `threads` results wait in memory.

    The threads go on while the caller works on what it was given.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque()
        for value in values:
            if len(waiting) == threads:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, value))
        while waiting:
            yield waiting.popleft().result()
