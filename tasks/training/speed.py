"""Makes a training step fast without changing what it computes, beyond rounding.

Which layers are computed again in the backward pass, which are compiled, and which gradients need not exist.
"""

import logging
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.training.attention import use_short_attention
from tasks.training.fused_lora import fuse_lora
from tasks.training.model import decoder_name
from tasks.training.recipe import Recipe

log = logging.getLogger(__name__)

# Kinds of layers times lengths of batches: each is compiled once.
COMPILED_VARIANTS = 64

# Forward passes after which compiling, a minute or two, has paid for itself.
COMPILING_PAYS = 200


def quicken(model: PeftModel, recipe: Recipe, *, on_gpu: bool, batches: int) -> None:
    """Make the training of `model` as fast as the recipe allows, for that many forward passes; say how in the log."""
    share = recipe.checkpointed_share if recipe.checkpointed_share is not None else float(on_gpu)
    checkpointed = checkpoint_layers(model, share)
    fused = fuse_lora(model) if on_gpu else 0
    compiled = recipe.compile if recipe.compile is not None else on_gpu and batches >= COMPILING_PAYS
    if compiled:
        use_short_attention(decoder(model))
        compile_layers(model)
    log.info(
        "%d of %d layers computed again in the backward pass, %d LoRA layers fused, %s",
        *(checkpointed, len(decoder_layers(model)), fused),
        "compiled" if compiled else "not compiled",
    )


def decoder(model: PeftModel) -> PreTrainedModel:
    """Return the language model without its head."""
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    found = base.get_submodule(decoder_name(base))
    assert isinstance(found, PreTrainedModel)
    return found


def decoder_layers(model: PeftModel) -> list[GradientCheckpointingLayer]:
    """Return the layers of the language model, first to last."""
    return _layers(decoder(model))


def _layers(module: nn.Module) -> list[GradientCheckpointingLayer]:
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


def checkpoint_layers(model: PeftModel, share: float) -> int:
    """Compute the activations of this share (0–1) of the decoder's layers again in the backward pass; return how many.

    The layers are spread evenly. Layers outside the language model are computed again if anything in them is trained.
    Transformers' own switch does the same for all layers, and makes the inputs of every tower need gradients: through a
    frozen vision tower that costs a backward pass that leads nowhere.
    """
    layers = decoder_layers(model)
    inside = {id(layer) for layer in layers}
    chosen = [layer for at, layer in enumerate(layers) if int((at + 1) * share) > int(at * share)]
    outside = [layer for layer in _layers(model.get_base_model()) if id(layer) not in inside]
    for layer in chosen + [layer for layer in outside if share and _is_trained(layer)]:
        # Reentrant checkpointing gives wrong gradients where layers share keys and values (Gemma 4 E2B and E4B).
        setattr(layer, "_gradient_checkpointing_func", partial(checkpoint, use_reentrant=False))  # noqa: B010
        layer.gradient_checkpointing = True
    return len(chosen)


def compile_layers(model: PeftModel) -> None:
    """Compile each layer of the model, its towers included, for each shape it meets."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    # What the next matrix product reads is cheap to compute again from what is kept anyway: 30 % less memory a layer.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for layer in _layers(model.get_base_model()):
        layer.compile(dynamic=False)


def _is_trained(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())
