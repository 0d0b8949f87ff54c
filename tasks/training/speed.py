"""Makes a training step fast without changing what it computes, beyond rounding.

Which layers are computed again in the backward pass, which are compiled, and which gradients need not exist.
"""

import logging

import torch
from peft import PeftModel
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.training.model import decoder_name

log = logging.getLogger(__name__)

# Kinds of layers times lengths of batches: each is compiled once.
COMPILED_VARIANTS = 64


def decoder_layers(model: PeftModel) -> list[GradientCheckpointingLayer]:
    """Return the layers of the language model, first to last."""
    base = model.get_base_model()
    return _layers(base.get_submodule(decoder_name(base)))


def _layers(module: nn.Module) -> list[GradientCheckpointingLayer]:
    return [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]


def checkpoint_layers(model: PeftModel, share: float) -> int:
    """Compute the activations of this share (0–1) of the decoder's layers again in the backward pass; return how many.

    The layers are spread evenly. Layers outside the language model are computed again if anything in them is trained.
    Inputs are not made to need gradients: `use_reentrant=False` does not ask for it, and through a frozen vision tower
    it would cost a backward pass that leads nowhere.
    """
    if share == 0:
        return 0
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.disable_input_require_grads()
    decoder = decoder_layers(model)
    inside = {id(layer) for layer in decoder}
    for layer in _layers(base):
        if id(layer) not in inside:
            layer.gradient_checkpointing = any(weight.requires_grad for weight in layer.parameters())
    for at, layer in enumerate(decoder):
        layer.gradient_checkpointing = int((at + 1) * share) > int(at * share)
    return sum(layer.gradient_checkpointing for layer in decoder)


def compile_layers(model: PeftModel) -> None:
    """Compile each layer of the language model, and of other towers where something is trained, for static shapes."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_VARIANTS)
    trained = [layer for layer in _layers(model.get_base_model()) if any(w.requires_grad for w in layer.parameters())]
    for layer in {id(layer): layer for layer in [*decoder_layers(model), *trained]}.values():
        layer.compile(dynamic=False)
