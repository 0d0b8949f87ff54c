"""The order in which a training sees its samples, the same however they are cut into batches and shared by GPUs."""

from collections.abc import Iterator
from itertools import count, islice

import torch
from torch.utils.data import Sampler


class Order(Sampler[int]):
    """Row numbers for `steps` optimizer steps of `per_step` samples each: shuffled passes over `rows`, end to end.

    No step is short, so forward passes of any size and number that make up a step get exactly its samples, one
    process or many, and a resumed training finds its place by counting. Pass n is shuffled with `seed` + n.
    """

    def __init__(self, rows: int, *, steps: int, per_step: int, seed: int) -> None:
        self.rows = rows
        self.steps = steps
        self.samples = steps * per_step
        self.seed = seed

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Iterator[int]:
        return islice((row for number in count() for row in self._pass(number)), self.samples)

    def _pass(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + number)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return order
