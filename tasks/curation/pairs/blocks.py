"""Blocks of embeddings in torch: on the GPU if there is one, one after the other, else one on each core.

A core to each block is faster than all cores on one, as blocks are small and cores need not wait for each other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from tasks.curation.pairs.embeddings import Vectors

S = TypeVar("S")
T = TypeVar("T")


def device() -> torch.device:
    """Return where to multiply."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def directions(vectors: Vectors) -> torch.Tensor:
    """Return embeddings as float32 of length 1, on the device."""
    return torch.nn.functional.normalize(torch.tensor(vectors, device=device()).float(), dim=1)


def each(function: Callable[[S], T], items: Iterable[S]) -> Iterator[T]:
    """Yield `function` of each item, in order; few results wait, so that memory stays flat."""
    if device().type == "cuda":
        yield from map(function, items)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread alone: what it does with the results must not wait for busy cores
    waiting: deque[Future[T]] = deque()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
