"""Makes a training step fast without changing what it computes, beyond rounding.

Which layers are computed again in the backward pass, which are compiled, and which gradients need not exist.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, ProcessorMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.training.attention import use_short_attention
from tasks.training.batches import MULTIPLE
from tasks.training.families import decoder_name, without_adapter
from tasks.training.fused_lora import fuse_lora
from tasks.training.lengths import LengthError, count_tokens
from tasks.training.memory.fits import checkpointed_share_for
from tasks.training.model import Placement
from tasks.training.recipe import Recipe

log = logging.getLogger(__name__)

# Kinds of layers times lengths of batches: each is compiled once.
COMPILED_VARIANTS = 64

# Forward passes after which compiling, a minute or two, has paid for itself.
COMPILING_PAYS = 200

CHECKED_ROWS = 64


def quicken(
    model: PeftModel | PreTrainedModel,
    recipe: Recipe,
    placement: Placement,
    *,
    examples: Dataset,
    processor: ProcessorMixin,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    passes: int,
) -> None:
    """Make the training of `model` in that many forward passes as fast as the recipe allows; say how in the log."""
    compiled = is_compiled(recipe, placement, passes)
    share = recipe.checkpointed_share
    if share is None:
        share = _share_that_fits(model, recipe, placement, examples, processor, collator, compiled=compiled)
    checkpointed = checkpoint_layers(model, share, reentrant=recipe.sharding == "zero3")
    fused = fuse_lora(model) if _has_whole_model_on_gpu(placement) else 0
    if compiled:
        use_short_attention(decoder(model))
        compile_layers(model)
    log.info(
        "%d of %d layers computed again in the backward pass, %d LoRA layers fused, %s",
        *(checkpointed, len(decoder_layers(model)), fused),
        "compiled" if compiled else "not compiled",
    )


def is_compiled(recipe: Recipe, placement: Placement, passes: int) -> bool:
    """Whether a training of that many forward passes compiles its layers."""
    if recipe.compile is not None:
        return recipe.compile
    return _has_whole_model_on_gpu(placement) and passes >= COMPILING_PAYS


def _has_whole_model_on_gpu(placement: Placement) -> bool:
    return placement.device.type == "cuda" and not placement.sharded


def _share_that_fits(
    model: PeftModel | PreTrainedModel,
    recipe: Recipe,
    placement: Placement,
    examples: Dataset,
    processor: ProcessorMixin,
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    *,
    compiled: bool,
) -> float:
    """The smallest share for which the largest batch fits the GPU; without one, memory is not what is short."""
    if placement.device.type != "cuda":
        return 0.0
    if placement.sharded:
        return 1.0
    try:
        longest = -(-int(count_tokens(examples, processor, collator).max()) // MULTIPLE) * MULTIPLE
    except LengthError as error:
        log.info("all layers are computed again in the backward pass, because memory can't be predicted: %s", error)
        return 1.0
    return checkpointed_share_for(
        without_adapter(model).config,
        recipe,
        torch.cuda.get_device_properties(placement.device).total_memory,
        batch=max(1, (recipe.tokens_per_batch or longest * recipe.batch_size) // longest),
        sample_tokens=longest,
        images=max(map(len, examples.with_format("arrow")[:CHECKED_ROWS]["images"])),
        compiled=compiled,
    )


def decoder(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Return the language model without its head."""
    base = without_adapter(model)
    found = base.get_submodule(decoder_name(base))
    assert isinstance(found, PreTrainedModel)
    return found


def decoder_layers(model: PeftModel | PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers of the language model, first to last."""
    return _layers(decoder(model))


def _layers(module: nn.Module) -> list[GradientCheckpointingLayer]:
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


def checkpoint_layers(model: PeftModel | PreTrainedModel, share: float, *, reentrant: bool = False) -> int:
    """Compute the activations of this share (0–1) of the decoder's layers again in the backward pass; return how many.

    The layers are spread evenly. Layers outside the language model are computed again if anything in them is trained.
    Trainers' own switch does it for all layers, and makes the inputs of every tower need gradients: through a frozen
    vision tower such as CLIP's that costs a backward pass that leads nowhere. `reentrant` is for DeepSpeed, which
    can't do without; it gives wrong gradients where layers share keys and values (Gemma 4 E2B and E4B).
    """
    layers = decoder_layers(model)
    inside = {id(layer) for layer in layers}
    chosen = [layer for at, layer in enumerate(layers) if int((at + 1) * share) > int(at * share)]
    outside = [layer for layer in _layers(without_adapter(model)) if id(layer) not in inside]
    for layer in chosen + [layer for layer in outside if share and _is_trained(layer)]:
        setattr(layer, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=reentrant))  # noqa: B010
        layer.gradient_checkpointing = True
    if reentrant and chosen:
        without_adapter(model).enable_input_require_grads()
    return len(chosen)


def compile_layers(model: PeftModel | PreTrainedModel) -> None:
    """Compile each layer of the model, its towers included, for each shape it meets."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    # What the next matrix product reads is cheap to compute again from what is kept anyway: 30 % less memory a layer.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for layer in _layers(without_adapter(model)):
        layer.compile(dynamic=False)


def _is_trained(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())
