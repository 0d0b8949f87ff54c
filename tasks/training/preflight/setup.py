"""All that the checks look at: the very model, collator and rows that a training with the recipe would use."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from tasks.training.collate import CompletionCollator
from tasks.training.conversations import ConversationCollator
from tasks.training.families import without_adapter
from tasks.training.lengths import count_tokens
from tasks.training.model import Placement
from tasks.training.recipe import Recipe

CHECKED_ROWS = 8
"""Rows that the checks of loss and learning look at, evenly spread over the examples."""

Collator = CompletionCollator | ConversationCollator
Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """A training that is ready to start.

    `examples` are rows of `dataset.FEATURES` or `documents.FEATURES`; `checkpointing` gives a context in which the
    model checkpoints as in the training, and is None if the recipe does without. A `model` that only several GPUs can
    hold has no weights.
    """

    recipe: Recipe
    placement: Placement
    processor: ProcessorMixin
    model: PeftModel | PreTrainedModel
    collator: Collator
    examples: Dataset
    checkpointing: Callable[[], AbstractContextManager[None]] | None = None

    @property
    def base(self) -> PreTrainedModel:
        """The model without the adapter around it."""
        return without_adapter(self.model)

    @property
    def has_weights(self) -> bool:
        """Whether anything can be computed with the model, or only its modules are there."""
        return not any(weight.is_meta for weight in self.model.parameters())

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, images included."""
        return count_tokens(self.examples, self.processor, self.collator)

    def rows(self) -> list[Row]:
        """Return the rows to look at."""
        count = min(CHECKED_ROWS, len(self.examples))
        return [self.examples[at * len(self.examples) // count] for at in range(count)]

    def batch(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Return the rows as the collator makes a batch of them, on the model's device."""
        batch = self.collator([dict(row) for row in rows])
        return {name: value.to(self.placement.device) for name, value in batch.items()}


def checkpointed_share(recipe: Recipe, placement: Placement) -> float:
    """Return the share of the language model's layers (0-1) to check with recomputation: all where a GPU decides."""
    if recipe.checkpointed_share is not None:
        return recipe.checkpointed_share
    return float(placement.device.type == "cuda")
