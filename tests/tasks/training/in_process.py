"""Trainings of the tiny Gemma 4 in the test's own process, so that a test can disturb them from within."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import set_seed

from tasks.training import child
from tasks.training import model as models
from tasks.training.metrics import Line, read_metrics
from tasks.training.recipe import Recipe

Disturb = Callable[[PeftModel], None]

# Metrics that depend on nothing but samples and weights.
LEARNED = ("step", "loss", "token_accuracy", "entropy", "learning_rate", "grad_norm", "samples")


@dataclass
class Training:
    """What a training left, and the samples of each forward pass of each step, in the order they were computed."""

    folder: Path
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    passes: list[list[str]] = field(default_factory=list)

    @property
    def metrics(self) -> list[Line]:
        return read_metrics(self.folder)


def train_here(
    recipe: Recipe, examples: Dataset, folder: Path, *, disturb: Disturb | None = None, monkeypatch: pytest.MonkeyPatch
) -> Training:
    """Train in this process what a child would have trained; `disturb` gets the model before it starts."""
    placement = models.place(recipe)
    processor = models.load_processor(recipe.base_model, recipe)
    set_seed(recipe.seed)
    model = models.add_lora(models.load_model(recipe.base_model, placement), recipe, base_model=recipe.base_model)
    if disturb:
        disturb(model)
    training = Training(folder)
    _watch_passes(training, monkeypatch)
    child.train_model(model, processor, examples, recipe, placement, folder)
    training.weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return training


def _watch_passes(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    add_gradients = child.Trainer._add_gradients

    def watched(self: Any, model: Any, batch: Any, items: Any) -> Any:
        loss = add_gradients(self, model, batch, items)
        if loss is not None:
            training.passes.extend(batch["sample_ids"])
        return loss

    monkeypatch.setattr(child.Trainer, "_add_gradients", watched)


def raise_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class RoomFor:
    """Makes a model's forward pass run out of memory with more rows than `rows`."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, model: PeftModel) -> None:
        model.register_forward_pre_hook(self._check, with_kwargs=True)

    def _check(self, model: PeftModel, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].shape[0] > self.rows:
            raise_out_of_memory()


class FailsInBackward:
    """Runs out of memory once, in the middle of the `at`-th backward pass, when some gradients are added already."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: PeftModel) -> None:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        weights[len(weights) // 2].register_post_accumulate_grad_hook(self._count)

    def _count(self, weight: torch.Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise_out_of_memory()


class Poisons:
    """Makes the pixels of the `at`-th forward pass not a number."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: PeftModel) -> None:
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: PeftModel, args: tuple[Any, ...], inputs: dict[str, Any]) -> Any:
        self.left -= 1
        if self.left == 0:
            inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], torch.nan)
        return args, inputs


class GradientsExplode:
    """Makes some gradients of the `at`-th backward pass infinite."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: PeftModel) -> None:
        next(weight for weight in model.parameters() if weight.requires_grad).register_hook(self._count)

    def _count(self, gradient: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        return torch.full_like(gradient, torch.inf) if self.left == 0 else gradient


class Interrupted:
    """Ends the training with KeyboardInterrupt at the `at`-th forward pass."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: PeftModel) -> None:
        model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def each(*disturbances: Disturb) -> Disturb:
    """Return a disturbance made of several, the first of them first in every forward pass."""

    def disturb(model: PeftModel) -> None:
        for one in disturbances:
            one(model)

    return disturb
