"""A recipe: the whole configuration of one training, as a form in the UI, a YAML file or Python.

The same recipe renders the prompts of training, evaluation and merging, so the three can't drift apart.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class RecipeError(ValueError):
    """A recipe can't be used; the message names the field, what is wrong with it and what to write instead."""


class Recipe(BaseModel):
    """How to fine-tune a base model with LoRA on a snapshot. Defaults suit QLoRA of a multi-billion-parameter model."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    base_model: str = Field(
        min_length=1, description="Folder of a transformers model with its processor, or its name on the hub."
    )
    prompt: str = Field(
        default="'Describe the image.'",
        min_length=1,
        description="What the user asks beneath the image: a SQL expression over the curated columns, "
        "so plain text stands in single quotes.",
    )
    completion: str = Field(
        default="caption",
        min_length=1,
        description="What the model shall answer: a SQL expression over the curated columns, such as "
        "caption or metadata ->> 'answer'. Samples where it is null or blank are left out.",
    )
    max_image_tokens: int | None = Field(
        default=None,
        ge=1,
        le=16384,
        description="Most tokens an image may become, if the processor has that setting (Gemma 4: 70, 140, 280, 560 "
        "or 1120). Empty keeps the processor's own.",
    )

    quantization: Literal["auto", "nf4", "none"] = Field(
        default="auto",
        description="How the base model's weights are held: nf4 (4-bit, double quantisation) or none. "
        "auto is nf4 on a GPU and none on a CPU.",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="What is computed in. auto is bf16 on a GPU and fp32 on a CPU."
    )

    method: Literal["lora", "full"] = Field(
        default="lora", description="lora trains small matrices beside frozen layers, full trains all weights."
    )
    lora_parts: tuple[Literal["language", "projector", "vision"], ...] = Field(
        default=("language",), description="Parts of the model that get LoRA."
    )
    full_parts: tuple[Literal["language", "projector", "vision"], ...] = Field(
        default=(), description="Parts of the model that are trained in full beside LoRA."
    )
    lora_rank: int = Field(default=64, ge=1, le=1024, description="Rank of the LoRA matrices.")
    lora_alpha: int = Field(
        default=64, ge=1, le=4096, description="LoRA scale: the update is multiplied by alpha / rank."
    )
    lora_dropout: float = Field(default=0.05, ge=0, lt=1, description="Dropout before the LoRA matrices, 0-1.")
    lora_targets: str = Field(
        default="(q|k|v|o|gate|up|down)_proj",
        min_length=1,
        description="Regular expression that the names of the language model's linear layers must match in full to "
        "get LoRA. Layers outside the language model never do.",
    )

    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="Peak learning rate; decays as a cosine to 0.")
    learning_rates: dict[Literal["language", "projector", "vision"], float] | None = Field(
        default=None, description="Learning rates of single parts, in place of learning_rate."
    )
    allow_high_learning_rate: bool = Field(
        default=False, description="Let a 4-bit base model be trained with a learning rate above 5e-5."
    )
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps over which the learning rate rises, 0-1."
    )
    batch_size: int = Field(default=4, ge=1, le=1024, description="Samples in one forward pass.")
    accumulation: int = Field(default=4, ge=1, le=1024, description="Forward passes per optimizer step.")
    epochs: float = Field(
        default=1.0, gt=0, le=1000, description="Passes over the training split, if max_steps is empty."
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps. Empty means as many as epochs asks for."
    )
    gradient_checkpointing: bool = Field(
        default=True, description="Compute activations again in the backward pass: slower, but needs far less memory."
    )
    save_steps: int = Field(
        default=100, ge=1, description="Steps between checkpoints, from which a killed run goes on."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of LoRA's initial weights, dropout and the order of samples."
    )

    max_new_tokens: int = Field(default=64, ge=1, le=8192, description="Longest answer in evaluation, tokens.")
    answer_batch_size: int = Field(default=16, ge=1, le=1024, description="Prompts answered at once in evaluation.")


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a YAML file, with `overrides` in place of what the file says.

    Raises `RecipeError` naming the file, each wrong field and what it may be.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe. Give the path of a YAML file.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: holds {type(data).__name__}, not fields. Write one `field: value` a line.")
    try:
        return Recipe.model_validate({**data, **(overrides or {})})
    except ValidationError as error:
        faults = "; ".join(_describe(fault) for fault in error.errors())
        raise RecipeError(f"{path}: {faults}") from None


def _describe(fault: Any) -> str:
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] != "extra_forbidden":
        return f"{name}: {fault['msg']} (got {fault['input']!r})" if name else str(fault["msg"])
    close = get_close_matches(name, Recipe.model_fields, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return f"{name}: no such field.{guess} Fields: {', '.join(sorted(Recipe.model_fields))}"
