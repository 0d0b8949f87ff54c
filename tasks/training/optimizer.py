"""How weights move: parameter groups with a learning rate for each part, schedules, and stopping early.

Source of the trainer's own part: `transformers.Trainer.create_optimizer`, which knows one learning rate only.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainerCallback

from tasks.training.families import parts_of
from tasks.training.recipe import Recipe, TrainablePart

_SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "paged_adamw_8bit": "paged_adamw_8bit"}


def parameter_groups(model: PeftModel | PreTrainedModel, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the weights that have gradients in groups of `params`, `lr`, `weight_decay` and `part`.

    Each part has its peak learning rate, the output head that of the language model. Vectors (norms, biases, DoRA's
    magnitudes) do not decay.
    """
    parts = parts_of(model)
    groups: dict[tuple[TrainablePart, bool], list[nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            part = parts.of(name)
            trained: TrainablePart = part if part in ("projector", "vision") else "language"
            shape = getattr(weight, "ds_shape", weight.shape)  # with ZeRO-3, a process's part of it has no shape
            groups.setdefault((trained, len(shape) > 1), []).append(weight)
    return [
        {
            "params": weights,
            "lr": recipe.learning_rate_of(part),
            "weight_decay": recipe.weight_decay if decays else 0.0,
            "part": part,
        }
        for (part, decays), weights in groups.items()
    ]


class RatesByPart(Trainer):
    """Mix it in before a trainer class, and set `recipe` before training: its optimizer gets `parameter_groups`."""

    recipe: Recipe

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer that the training arguments name."""
        chosen: Any = self.model if model is None else model
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, chosen)
        self.optimizer_cls_and_kwargs = kind, {**options, "params": parameter_groups(chosen, self.recipe)}
        return super().create_optimizer(model)


def optimization_arguments(recipe: Recipe, *, steps: int) -> dict[str, Any]:
    """Return the fields of `TrainingArguments` that say how `steps` optimizer steps move the weights."""
    arguments: dict[str, Any] = {
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": _SCHEDULERS[recipe.scheduler],
        "warmup_steps": min(math.ceil(recipe.warmup * steps), steps - 1),  # the first of them learns nothing
        "optim": _OPTIMIZERS[recipe.optimizer],
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": recipe.max_grad_norm,
        "neftune_noise_alpha": recipe.neftune_alpha,
    }
    if recipe.early_stop_patience:
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": recipe.save_steps,
            "per_device_eval_batch_size": recipe.batch_size,
            "prediction_loss_only": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
            "restore_callback_states_from_checkpoint": True,  # how long it has waited already
        }
    return arguments


def early_stop(recipe: Recipe) -> list[TrainerCallback]:
    """Return what ends a training whose loss on held-out examples stops falling, if the recipe asks for it."""
    return [EarlyStoppingCallback(recipe.early_stop_patience)] if recipe.early_stop_patience else []


def has_waited_enough(callbacks: Iterable[TrainerCallback]) -> bool:
    """Whether one of a trainer's callbacks has stopped the training early."""
    waiting = [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]
    return any(callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in waiting)
