"""Builds batches by a budget of tokens from samples of like length, the same ones whenever a training is run again.

Little is then spent on padding, every batch takes about the same time and memory, and compiled layers see few shapes.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F  # noqa: N812 - its usual name
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import ProcessorMixin, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.training.collate import IGNORED
from tasks.training.lengths import count_tokens
from tasks.training.patches import trim_patches
from tasks.training.recipe import Recipe

log = logging.getLogger(__name__)

MULTIPLE = 64
"""Sequences are padded to a multiple of this many tokens."""


class BatchError(ValueError):
    """Samples can't be put into batches; the message names the sample and what to change."""


class TokenBatches(Sampler[list[int]]):
    """Batches of row numbers, each at most `tokens` tokens with padding; every row once in an epoch.

    Rows go together by their lengths, rounded up to `MULTIPLE`, and at random where those are equal. Batches come in an
    order that depends on `seed` and the epoch only, and all epochs have equally many, a multiple of `processes`: that
    many in a row are of like length, one for each process. (Only where nothing but batches of one row is left to make
    up that multiple, fewer than `processes` rows come twice.) `tokens_padded` are those of the first epoch with
    padding. Raises `BatchError` if a row is longer than a batch; `ids` name the rows.
    """

    def __init__(
        self, lengths: Sequence[int] | np.ndarray, ids: Sequence[str], *, tokens: int, seed: int, processes: int = 1
    ) -> None:
        self.padded = -(-np.asarray(lengths, np.int64) // MULTIPLE) * MULTIPLE
        self.tokens, self.seed, self.processes = tokens, seed, processes
        self.epoch = 0
        self._check(ids)
        batches = self._composed(np.random.default_rng([seed, 0]))
        self._length = len(batches)
        self.tokens_padded = sum(int(self.padded[batch].max()) * len(batch) for batch in batches)

    def start_epoch(self, epoch: int) -> None:
        """Give the batches of the epoch, from 0, when iterated next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of an epoch, over all processes."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches = self._composed(rng)
        together = [batches[at : at + self.processes] for at in range(0, len(batches), self.processes)]
        for at in rng.permutation(len(together)):
            yield from ([int(row) for row in batch] for batch in together[at])

    def _composed(self, rng: np.random.Generator) -> list[np.ndarray]:
        """All batches, longest rows first: each takes as many of the next rows as its longest allows."""
        order = np.lexsort((rng.random(len(self.padded)), -self.padded))
        batches: list[np.ndarray] = []
        at = 0
        while at < len(order):
            size = int(self.tokens // self.padded[order[at]])
            batches.append(order[at : at + size])
            at += size
        while len(batches) % self.processes:  # each process needs as many: halve a batch, or repeat one of a single row
            largest = max(range(len(batches)), key=lambda number: len(batches[number]))
            halves = np.array_split(batches[largest], 2) if len(batches[largest]) > 1 else [batches[largest]] * 2
            batches[largest : largest + 1] = halves
        return batches

    def _check(self, ids: Sequence[str]) -> None:
        longest = int(self.padded.argmax())
        if self.padded[longest] > self.tokens:
            count = int((self.padded > self.tokens).sum())
            raise BatchError(
                f"tokens_per_batch: sample {ids[longest]} has {self.padded[longest]} tokens, padding to a multiple of "
                f"{MULTIPLE} included, and {count - 1} others are longer than the {self.tokens} of a batch too. Write "
                "at least that many, lower max_image_tokens, or leave long samples out by a condition of the policy."
            )


@dataclass(frozen=True)
class PaddedCollator:
    """A collator whose sequences are padded to a multiple of `MULTIPLE` tokens on the right, and its images little."""

    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    pad_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch with longer input_ids, attention_mask, labels and token types."""
        batch = trim_patches(dict(self.collator(rows)))
        fill = {"input_ids": self.pad_id, "labels": IGNORED, "attention_mask": 0}
        fill |= {"token_type_ids": 0, "mm_token_type_ids": 0}
        missing = -batch["input_ids"].shape[1] % MULTIPLE
        for name in fill.keys() & batch.keys():
            batch[name] = F.pad(batch[name], (0, missing), value=fill[name])
        return batch


def make_batches(
    rows: Dataset,
    processor: ProcessorMixin,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    recipe: Recipe,
    *,
    processes: int = 1,
    workers: int = 0,
) -> TokenBatches | None:
    """Return the recipe's batches of the rows, or None if it does not ask for batches by tokens.

    They are for `processes` that train together; `workers` others count the tokens.

    Raises `BatchError`, or `LengthError` if the processor's tokens can't be counted.
    """
    if recipe.tokens_per_batch is None:
        return None
    lengths = count_tokens(rows, processor, collator, workers=workers)
    batches = TokenBatches(
        lengths, rows["sample_id"], tokens=recipe.tokens_per_batch, seed=recipe.seed, processes=processes
    )
    padding = 1 - lengths.sum() / batches.tokens_padded
    log.info("%d batches of up to %d tokens, %.1f %% of them padding", len(batches), batches.tokens, 100 * padding)
    return batches


class StartEpochs(TrainerCallback):
    """Tells the batches which epoch begins: accelerate does not in an epoch resumed by several processes."""

    def __init__(self, batches: TokenBatches) -> None:
        self.batches = batches

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell them."""
        self.batches.start_epoch(int(state.epoch or 0))
