"""A recipe: the whole configuration of one training, as a form in the UI, a YAML file or Python.

The same recipe renders the prompts of training, evaluation and merging, so the three can't drift apart.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from tasks.shipped import find_path

TrainablePart = Literal["language", "projector", "vision"]
"""Parts of a model that a recipe can train; `families.parts_of` says which modules they are."""

Sharding = Literal["none", "fsdp", "zero3"]
"""What several processes share: nothing, or every weight, its gradient and its optimizer state."""

HIGHEST_4BIT_LEARNING_RATE = 5e-5
"""Above it, adapters on a 4-bit base often get worse while their loss looks fine."""

LearningRate = Annotated[float, Field(gt=0, le=1)]
Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[int, Field(ge=1, le=4096)]


class RecipeError(ValueError):
    """A recipe can't be used; the message names the field, what is wrong with it and what to write instead."""


class Recipe(BaseModel):
    """How to fine-tune a base model on a snapshot. Defaults suit QLoRA of a multi-billion-parameter model."""

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
        description="Most tokens an image may become, if the model's images vary in that (Gemma 4: 70, 140, 280, 560 "
        "or 1120; Qwen-VL and SmolVLM: any number). Empty keeps the processor's own.",
    )

    method: Literal["lora", "full"] = Field(
        default="lora",
        description="lora trains small matrices beside the weights of lora_parts; full trains the weights of "
        "full_parts themselves, and no LoRA field has a meaning.",
    )
    full_parts: tuple[TrainablePart, ...] = Field(
        default=(), description="Parts whose own weights are trained; with method lora, projector or vision."
    )

    quantization: Literal["auto", "nf4", "none"] = Field(
        default="auto",
        description="How the base model's weights are held: nf4 (4-bit, double quantisation) or none. "
        "auto is nf4 for LoRA on a GPU, unless sharding is zero3, else none.",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        default="auto", description="What is computed in. auto is bf16 on a GPU and fp32 on a CPU."
    )

    lora_parts: tuple[TrainablePart, ...] = Field(
        default=("language",),
        description="Parts of the model that get LoRA; all linear layers of projector and vision.",
    )
    lora_targets: str = Field(
        default="(q|k|v|o|gate|up|down)_proj",
        min_length=1,
        description="Regular expression that the names of the language model's linear layers must match in full to "
        "get LoRA. Layers of other parts never need to.",
    )
    lora_rank: Rank = Field(default=64, description="Rank of the LoRA matrices.")
    lora_alpha: Alpha = Field(default=64, description="LoRA scale: the update is multiplied by alpha / rank.")
    lora_dropout: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="Dropout before the LoRA matrices, 0-1. Without it, they are computed faster.",
    )
    use_rslora: bool = Field(
        default=False, description="Multiply the update by alpha / sqrt(rank): for ranks of 64 and more (rsLoRA)."
    )
    use_dora: bool = Field(
        default=False, description="Learn the length of each weight column apart from its direction (DoRA): slower."
    )
    rank_pattern: dict[str, Rank] = Field(
        default={}, description="Other ranks for some layers, by regular expression on the end of their names."
    )
    alpha_pattern: dict[str, Alpha] = Field(
        default={}, description="Other alphas for some layers, by regular expression on the end of their names."
    )

    learning_rate: LearningRate = Field(default=5e-5, description="Peak learning rate.")
    learning_rates: dict[TrainablePart, LearningRate] = Field(
        default={}, description="Peak learning rates of single parts, in place of learning_rate."
    )
    allow_high_learning_rate: bool = Field(
        default=False, description="Accept learning rates above 5e-5 on a 4-bit base model."
    )
    scheduler: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How learning rates go on after the warmup: fall to 0, or stay."
    )
    warmup: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the steps over which the learning rate rises, 0-1."
    )
    optimizer: Literal["adamw", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="paged_adamw_8bit holds the optimizer's state in 8 bits, and moves it to main memory when the "
        "GPU's is full; not with sharding: fsdp.",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's decay of weights other than norms.")
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradients longer than this (L2 norm over all weights) are scaled down to it."
    )
    neftune_alpha: float | None = Field(
        default=None, gt=0, description="Strength of the noise on token embeddings in training (NEFTune). Empty: none."
    )
    batch_size: int = Field(default=4, ge=1, le=1024, description="Samples in one forward pass.")
    tokens_per_batch: int | None = Field(
        default=None,
        ge=1,
        le=1_048_576,
        description="Tokens in one forward pass, padding and images included; samples of like length go together, and "
        "batch_size has no effect. Empty: batch_size samples in random order.",
    )
    accumulation: int = Field(default=4, ge=1, le=1024, description="Forward passes per optimizer step.")
    epochs: float = Field(
        default=1.0, gt=0, le=1000, description="Passes over the training split, if max_steps is empty."
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Optimizer steps. Empty means as many as epochs asks for."
    )
    early_stop_patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop after so many evaluations without a lower loss on the validation split, one every save_steps "
        "steps, and keep the best weights. Empty: never stop early.",
    )
    checkpointed_share: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the language model's layers whose activations are computed again in the backward pass, "
        "0-1: slower, but needs less memory. Empty means as few as the device's memory allows.",
    )
    compile: bool | None = Field(
        default=None,
        description="Whether the layers are compiled, which takes a minute or two. Empty means on a GPU, if the "
        "training is long enough for it to pay.",
    )
    cache_vision_features: bool | None = Field(
        default=None,
        description="Whether what a frozen vision tower makes of each image is computed once and kept on disk. Empty "
        "means if the images are seen more than once.",
    )
    gpus: int = Field(
        default=1,
        ge=1,
        le=64,
        description="GPUs of this machine to train on together, or processes where it has none. The samples of a step "
        "stay batch_size × accumulation, so accumulation must be a multiple of it.",
    )
    sharding: Sharding = Field(
        default="none",
        description="What several GPUs share: none gives each a whole model (data parallel); fsdp (FSDP2) and zero3 "
        "(DeepSpeed ZeRO-3) give each a part of every weight, gradient and optimizer state, from loading on. 4-bit "
        "models need fsdp, and each GPU loads all of one first. fsdp is faster.",
    )
    save_steps: int = Field(
        default=100, ge=1, description="Steps between checkpoints, from which a killed run goes on."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="Seed of LoRA's initial weights, dropout and the order of samples."
    )

    max_new_tokens: int = Field(default=64, ge=1, le=8192, description="Longest answer in evaluation, tokens.")
    answer_batch_size: int = Field(default=16, ge=1, le=1024, description="Prompts answered at once in evaluation.")

    @property
    def trained_parts(self) -> tuple[TrainablePart, ...]:
        """Parts that the training changes, by LoRA or in full."""
        lora = self.lora_parts if self.method == "lora" else ()
        return tuple(dict.fromkeys((*lora, *self.full_parts)))

    def is_four_bit(self, *, on_gpu: bool) -> bool:
        """Return whether the base model is held in 4 bits."""
        if self.quantization == "auto":
            return on_gpu and self.method == "lora" and self.sharding != "zero3"
        return self.quantization == "nf4"

    def learning_rate_of(self, part: TrainablePart) -> float:
        """Return the peak learning rate of a part."""
        return self.learning_rates.get(part, self.learning_rate)

    def check_learning_rates(self, *, four_bit: bool) -> None:
        """Raise `RecipeError` if a learning rate is too high for a 4-bit base and nobody said that it is meant."""
        rates = {part: self.learning_rate_of(part) for part in self.trained_parts}
        high = [f"{part} {rate:g}" for part, rate in rates.items() if rate > HIGHEST_4BIT_LEARNING_RATE]
        if four_bit and high and not self.allow_high_learning_rate:
            raise RecipeError(
                f"learning_rate: {', '.join(high)} is above {HIGHEST_4BIT_LEARNING_RATE:g}, which often makes a 4-bit "
                "base model worse while the loss looks fine. Lower it, set quantization: none, or write "
                "allow_high_learning_rate: true."
            )

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        try:
            self._check_parts()
            self._check_patterns()
            self._check_features()
            self._check_sharing()
            self.check_learning_rates(four_bit=self.quantization == "nf4")
        except RecipeError as error:
            raise PydanticCustomError("recipe", "{error}", {"error": str(error)}) from None
        return self

    def _check_parts(self) -> None:
        if self.method == "full":
            self._check_full()
        elif not self.lora_parts:
            raise RecipeError("lora_parts: is empty, so nothing gets LoRA. Name a part, or write method: full.")
        elif "language" in self.full_parts:
            raise RecipeError("full_parts: language can't be trained in full beside LoRA. Write method: full.")
        elif both := set(self.lora_parts) & set(self.full_parts):
            raise RecipeError(f"full_parts: {min(both)} has LoRA already. Name it in lora_parts or here, not in both.")
        if strangers := [part for part in self.learning_rates if part not in self.trained_parts]:
            raise RecipeError(
                f"learning_rates: {strangers[0]} is not trained. Parts that are: {', '.join(self.trained_parts)}."
            )

    def _check_full(self) -> None:
        if not self.full_parts:
            raise RecipeError(
                "full_parts: is empty, so method: full trains nothing. Name language, projector or vision."
            )
        if self.quantization == "nf4":
            raise RecipeError("quantization: 4-bit weights can't be trained. With method: full, write none or auto.")
        lora_only = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
        if given := [name for name in lora_only if getattr(self, name)]:
            raise RecipeError(f"{given[0]}: has no effect with method: full. Leave it out, or write method: lora.")

    def _check_patterns(self) -> None:
        for field in ("lora_targets", "rank_pattern", "alpha_pattern"):
            given = getattr(self, field)
            for pattern in [given] if isinstance(given, str) else given:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise RecipeError(f"{field}: {pattern!r} is not a regular expression ({error}).") from None

    def _check_features(self) -> None:
        if not self.cache_vision_features:
            return
        if trained := [part for part in self.trained_parts if part != "language"]:
            raise RecipeError(
                f"cache_vision_features: {trained[0]} is trained, so what it makes of an image changes. Leave it empty."
            )
        if self.gpus > 1:
            raise RecipeError(f"cache_vision_features: {self.gpus} gpus compute images anew each time. Leave it empty.")

    def _check_sharing(self) -> None:
        if self.accumulation % self.gpus:
            raise RecipeError(
                f"gpus: {self.gpus} can't share {self.accumulation} forward passes a step evenly. "
                f"{self._shareable_step()}, or another number of gpus."
            )
        if self.sharding != "none" and self.gpus == 1:
            raise RecipeError(
                f"sharding: {self.sharding} needs several GPUs. Write gpus: 2 or more, or sharding: none."
            )
        if self.sharding == "zero3" and self.quantization == "nf4":
            raise RecipeError("sharding: zero3 can't share 4-bit weights. Write sharding: fsdp, or quantization: none.")
        if self.sharding == "fsdp" and self.optimizer != "adamw":
            raise RecipeError(
                f"optimizer: {self.optimizer} can't keep the states of weights that sharding: fsdp divides. "
                "Write adamw: its states are divided too, 8 bytes a weight among all gpus."
            )

    def _shareable_step(self) -> str:
        """Advice for a step that `gpus` can share: of as many samples, in forward passes no larger than now."""
        samples = self.batch_size * self.accumulation
        passes = range(self.accumulation + -self.accumulation % self.gpus, samples + 1, self.gpus)
        fitting = next((n for n in passes if samples % n == 0), None)
        if fitting is None:
            return f"Write accumulation: {passes.start}"
        return f"Write accumulation: {fitting} and batch_size: {samples // fitting}"


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe of a YAML file, with `overrides` in place of what the file says.

    Raises `RecipeError` naming the file, each wrong field and what it may be.
    """
    path = Path(path)
    try:
        data = yaml.safe_load(find_path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(
            f"{path.absolute()}: there is no such recipe file. Shipped ones lie in deployments/recipes."
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}. Give the path of a YAML file.") from None
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
