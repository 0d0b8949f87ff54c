"""Trains a model's own weights without LoRA, and keeps those that were trained as safetensors beside their names.

What is kept is put back on the base model for evaluation and merging, so only trained parts take space; merging gives
an ordinary model folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel

from tasks.training.families import ModelError, Part, missing_part, parts_of
from tasks.training.recipe import Recipe, RecipeError

PARTS = "trained_parts.json"
_PATTERN = "trained{suffix}.safetensors"


def train_in_full(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Return `model` with gradients for the weights of the recipe's `full_parts`, and for no others.

    The output head belongs to the language model. Raises `RecipeError` if the model lacks a part.
    """
    names = _names(model, recipe.full_parts)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)
    return model


def _names(model: PreTrainedModel, chosen: tuple[Part, ...]) -> set[str]:
    parts = parts_of(model)
    wanted = {*chosen, "head"} if "language" in chosen else set(chosen)
    of = {name: parts.of(name) for name, _ in model.named_parameters()}
    for part in chosen:
        if part not in of.values():
            raise RecipeError(f"full_parts: {missing_part(model, part)}")
    return {name for name, part in of.items() if part in wanted}


def save_weights(weights: Mapping[str, torch.Tensor], folder: Path, *, parts: tuple[Part, ...]) -> None:
    """Write the trained weights as safetensors of at most 4 GB, and their parts' names."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(dict(weights), folder, filename_pattern=_PATTERN, max_shard_size="4GB")
    (folder / PARTS).write_text(json.dumps(parts))


def is_saved_in_full(folder: str | Path) -> bool:
    """Whether `folder` holds what `save_weights` wrote."""
    return Path(folder, PARTS).is_file()


def load_weights(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put trained weights in place of the base model's. Raises `ModelError` unless every one finds its place."""
    parts = tuple(json.loads(Path(folder, PARTS).read_text()))
    own, missing = dict(model.named_parameters()), _names(model, parts)
    if not all(own[name].is_floating_point() for name in missing):
        raise ModelError(
            f"{folder}: its weights of {', '.join(parts)} were trained in full, and those of the base model are in 4 "
            "bits. Set quantization: none."
        )
    for file in sorted(Path(folder).glob("*.safetensors")):
        for name, weight in load_file(file).items():
            if name not in missing or own[name].shape != weight.shape:
                raise ModelError(
                    f"{file}: {name} has no place in {type(model).__name__}. Give the model it was trained on."
                )
            own[name].data.copy_(weight)
            missing.discard(name)
    if missing:
        raise ModelError(f"{folder}: lacks {min(missing)} and {len(missing) - 1} others. Train the run again.")
    return model
