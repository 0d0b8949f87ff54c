"""Predicts the peak GPU memory of a training from its configuration and recipe, before a weight is loaded."""

from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from tasks.training.memory.held import held_by_each
from tasks.training.memory.skeleton import Layer, Skeleton, Stack, image_inputs, skeleton_of
from tasks.training.recipe import Recipe

Logits = Literal["supervised", "all"]
"""Positions whose logits are computed: those with a label, as by TRL's fused head, or all, as by the model itself."""

TILE_TOKENS, TILE_ENTRIES = 4096, 32768
"""Tokens and entries of the vocabulary whose logits TRL's fused head has at a time (`trl.kernels.chunked_logprob`)."""

IMAGE_TOKENS = 280
"""Tokens an image may become where neither recipe nor caller says; Gemma 4's own bound."""


@dataclass(frozen=True)
class Workload:
    """What one micro-batch is made of.

    `batch` rows are padded to `sample_tokens` tokens each, of which `supervised_tokens` have a label; each row has
    `images` images of up to `image_tokens` tokens.
    """

    batch: int
    sample_tokens: int
    images: int = 1
    image_tokens: int = IMAGE_TOKENS
    supervised_tokens: int = 64

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, padding included."""
        return self.batch * self.sample_tokens


@dataclass(frozen=True)
class Estimate:
    """Bytes held at the moment of a training step when most is held, as `torch.cuda.max_memory_allocated` counts them.

    Of several GPUs that share a model, each holds so much. `weights` are frozen, `adapters` are trained; `gathered` are
    weights that are whole while a layer is at work. `activations` are kept for the backward pass at that moment;
    `working` is what the layer then at work needs besides, and `logits` what the output head does. The CUDA context,
    and what the allocator holds without using it, come on top. `moment` says when it is.
    """

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    working: int
    logits: int
    inputs: int
    moment: str
    gathered: int = 0

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))

    def __str__(self) -> str:
        parts = [(field.name, getattr(self, field.name)) for field in fields(self) if field.type is int]
        listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts if value)
        return f"{self.peak_bytes / 2**30:.2f} GiB at the {self.moment}: {listed}"


LOADING = "loading, before it is shared"
NOTHING = Estimate(0, 0, 0, 0, 0, 0, 0, 0, moment="")


def estimate(
    config: PretrainedConfig,
    recipe: Recipe,
    *,
    batch: int,
    sample_tokens: int,
    images: int = 1,
    image_tokens: int | None = None,
    supervised_tokens: int = 64,
    compiled: bool = True,
    checkpointed_share: float = 1.0,
    logits: Logits = "supervised",
    adapter_dtype: torch.dtype = torch.float32,
) -> Estimate:
    """Return the predicted peak of training `config`'s model as `recipe` says, on a GPU.

    `batch` rows are padded to `sample_tokens` each and have `images` images of up to `image_tokens` tokens (those of
    the recipe if None). `compiled` says whether the layers go through `torch.compile`. `checkpointed_share` (0-1) is
    the share of the language model's layers that are computed again in the backward pass.
    """
    model = MemoryModel(
        skeleton_of(config, recipe, adapter_dtype=adapter_dtype), recipe, compiled=compiled, logits=logits
    )
    tokens = image_tokens or recipe.max_image_tokens or IMAGE_TOKENS
    workload = Workload(batch, sample_tokens, images, tokens, supervised_tokens)
    return model.estimate(workload, checkpointed_share=checkpointed_share)


class MemoryModel:
    """Predicts peaks of one model and recipe for many workloads; a workload's layers are rehearsed once."""

    def __init__(
        self, skeleton: Skeleton, recipe: Recipe, *, compiled: bool = True, logits: Logits = "supervised"
    ) -> None:
        self.skeleton, self.recipe, self.compiled, self.logits = skeleton, recipe, compiled, logits
        self._stack = lru_cache(maxsize=64)(self._rehearse)
        self.held = held_by_each(skeleton, recipe)
        self.resting = Estimate(
            weights=self.held.weights,
            adapters=self.held.trained,
            optimizer=self.held.optimizer,
            gradients=0,
            activations=0,
            working=0,
            logits=0,
            inputs=0,
            moment="start",
        )

    def estimate(self, workload: Workload, *, checkpointed_share: float = 1.0) -> Estimate:
        """Return the predicted peak when so large a share of the language model's layers (0-1) is computed again."""
        stack = self._stack(workload)
        resting = replace(self.resting, inputs=self._inputs(workload))
        moments = [
            self._seeing(resting, stack),
            self._computing_loss(resting, stack, workload, share=checkpointed_share),
            *self._going_back(resting, stack, share=checkpointed_share),
            replace(resting, gradients=self.held.stepping, moment="optimizer step"),
            replace(NOTHING, weights=self.held.loading, moment=LOADING),
        ]
        return max(moments, key=lambda moment: moment.peak_bytes)

    def language_layers(self, workload: Workload) -> int:
        """Return how many layers the language model has."""
        return sum(not layer.vision for layer in self._stack(workload).layers)

    def with_accumulation(self, accumulation: int) -> "MemoryModel":
        """Return this model for another number of micro-batches a step; what was rehearsed is shared."""
        other = copy(self)
        other.recipe = self.recipe.model_copy(update={"accumulation": accumulation})
        return other

    def _rehearse(self, workload: Workload) -> Stack:
        images = workload.batch * workload.images
        return self.skeleton.stack(
            batch=workload.batch, tokens=workload.sample_tokens, images=images, image_tokens=workload.image_tokens
        )

    def _seeing(self, resting: Estimate, stack: Stack) -> Estimate:
        """While a frozen vision tower runs."""
        return replace(
            resting,
            working=stack.frozen_vision,
            gradients=self._held_back,
            gathered=self.held.gathered,
            moment="vision tower",
        )

    def _computing_loss(self, resting: Estimate, stack: Stack, workload: Workload, *, share: float) -> Estimate:
        """When the forward pass has come to its end."""
        kept = stack.around + sum(self._kept(stack, share))
        return replace(
            resting,
            activations=kept,
            gradients=self._held_back,
            gathered=self.held.gathered,
            logits=self._logit_bytes(workload),
            moment="loss",
        )

    def _going_back(self, resting: Estimate, stack: Stack, *, share: float) -> list[Estimate]:
        """In the backward pass of each layer: those above have their gradients, those below what they kept."""
        kept, moments = self._kept(stack, share), []
        for at, layer in enumerate(stack.layers):
            footprint = layer.footprint
            own = footprint.hidden + footprint.kept_by(compiled=self.compiled)
            above = sum(higher.gradients for higher in stack.layers[at + 1 :]) // self._ranks
            moments.append(
                replace(
                    resting,
                    activations=stack.around + sum(kept[:at]) + own,
                    working=footprint.working,
                    gradients=max(above, self._held_back) + self.held.reducing,
                    gathered=self.held.gathered,
                    moment=f"backward pass of layer {at + 1} of {len(stack.layers)}",
                )
            )
        return moments

    def _kept(self, stack: Stack, share: float) -> list[int]:
        """What each layer keeps from its forward pass: its input, and the rest too if it is not computed again."""
        again = checkpointed_layers(stack.layers, share)
        return [
            layer.footprint.hidden + (0 if at in again else layer.footprint.kept_by(compiled=self.compiled))
            for at, layer in enumerate(stack.layers)
        ]

    @property
    def _held_back(self) -> int:
        """Gradients of earlier micro-batches of the same step."""
        return self.held.gradients if self._passes > 1 else 0

    @property
    def _passes(self) -> int:
        """Micro-batches of a step that one process computes."""
        return max(1, self.recipe.accumulation // self.recipe.gpus)

    @property
    def _ranks(self) -> int:
        """Processes that share each gradient."""
        return 1 if self.recipe.sharding == "none" else self.recipe.gpus

    def _logit_bytes(self, workload: Workload) -> int:
        """The output head at work: a tile of logits and the hidden states with gradients, or all logits with theirs."""
        text: Any = self.skeleton.config.get_text_config()
        width = self.skeleton.dtype.itemsize
        if self.logits == "supervised":
            rows = min(workload.tokens, workload.batch * workload.supervised_tokens)
            return int(min(rows, TILE_TOKENS) * TILE_ENTRIES * width + rows * text.hidden_size * (4 + 2 * width))
        capped = 2 * width if getattr(text, "final_logit_softcapping", None) else width
        return int(workload.tokens * text.vocab_size * (capped + 3 * 4))

    def _inputs(self, workload: Workload) -> int:
        """Images of all micro-batches of a step: the trainer fetches them together, to count their labels."""
        images = workload.batch * workload.images
        if not images or self.skeleton.vision is None:
            return 0
        tensors = image_inputs(self.skeleton.config.vision_config, images, workload.image_tokens, torch.float32)
        return self._passes * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def checkpointed_layers(layers: Sequence[Layer], share: float) -> set[int]:
    """Return which layers are computed again: `share` of the language model's, spread evenly; all of a tower if any."""
    language = [at for at, layer in enumerate(layers) if not layer.vision]
    chosen = [layer for at, layer in enumerate(language) if int((at + 1) * share) > int(at * share)]
    return {*chosen, *(at for at, layer in enumerate(layers) if layer.vision and chosen)}
