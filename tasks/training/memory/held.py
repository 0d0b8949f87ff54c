"""What one process holds of a model's weights, their gradients and the optimizer's states: all of it, or its part.

Several processes that share a model (recipe: `sharding`) hold a part of each weight, and for a time whole weights.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from tasks.training.distributed import layer_classes
from tasks.training.memory.skeleton import NF4_CODE_BYTES, Skeleton, rows_of_part
from tasks.training.recipe import Recipe

FSDP_LAYERS = 2
"""Layers that FSDP2 holds whole at once: the one at work, and the next, which is on its way."""

ZERO3_LIVE, ZERO3_BUCKETS = 10**9, 10**9
"""Most weights that DeepSpeed keeps whole (`stage3_max_live_parameters`), and gradients in its two buckets."""

FP32 = 4


@dataclass(frozen=True)
class Held:
    """Bytes that one process holds.

    `weights` are frozen. `gradients` are kept from one forward pass of a step to the next, `stepping` are they when
    the optimizer needs them. `gathered` are whole weights while layers are at work, `reducing` whole gradients on their
    way to those who keep a part. `loading` is the most that is held before the model is shared.
    """

    weights: int
    trained: int
    optimizer: int
    gradients: int
    stepping: int
    gathered: int = 0
    reducing: int = 0
    loading: int = 0


def held_by_each(skeleton: Skeleton, recipe: Recipe) -> Held:
    """Return what each process of a training holds."""
    if recipe.sharding == "fsdp":
        return _with_fsdp(skeleton, recipe.gpus)
    if recipe.sharding == "zero3":
        return _with_zero3(skeleton, recipe.gpus)
    trained = _bytes(skeleton.trained())
    optimizer = sum(optimizer_bytes(weight, recipe.optimizer) for weight in skeleton.trained())
    copies = trained if recipe.gpus > 1 else 0  # DistributedDataParallel sums gradients in buckets of its own
    return Held(
        skeleton.weight_bytes(), trained, optimizer, gradients=trained, stepping=trained + copies, reducing=copies
    )


def _with_fsdp(skeleton: Skeleton, ranks: int) -> Held:
    """Parts in 32 bits of what is trained; a layer is gathered, and its gradients are summed, as one unit.

    What is in no layer, such as embeddings, stays whole until its gradients are summed at the very end.
    """
    trained = FP32 * sum(rows_of_part(weight, ranks) for weight in skeleton.trained())
    layers, beside = _units(skeleton)
    width = skeleton.dtype.itemsize
    largest = max((_trained(layer) for layer in layers), default=0)
    return Held(
        weights=skeleton.weight_bytes(ranks=ranks),
        trained=trained,
        optimizer=2 * trained,
        gradients=trained,
        stepping=trained,
        gathered=FSDP_LAYERS * max((_whole(skeleton, layer) for layer in layers), default=0) + _whole(skeleton, beside),
        reducing=width * _trained(beside) + max((width + FP32) * largest, FP32 * _trained(beside)),
        loading=skeleton.weight_bytes() + _bytes(skeleton.trained()) if skeleton.four_bit else 0,
    )


def _with_zero3(skeleton: Skeleton, ranks: int) -> Held:
    """Parts in the model's own dtype and once more in 32 bits; whole weights and gradients up to DeepSpeed's bounds."""
    part = sum(rows_of_part(weight, ranks) for weight in skeleton.trained())
    width = skeleton.dtype.itemsize
    everything = sum(weight.numel() for weight in skeleton.model.parameters())
    return Held(
        weights=skeleton.weight_bytes(ranks=ranks),
        trained=(width + FP32) * part,
        optimizer=2 * FP32 * part,
        gradients=width * part,
        stepping=(width + FP32) * part,
        gathered=width * min(everything, ZERO3_LIVE),
        reducing=width * min(2 * _trained(skeleton.trained()), ZERO3_BUCKETS),
    )


def _units(skeleton: Skeleton) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """The weights of each layer, and those of none."""
    names = layer_classes(skeleton.base)
    layers = [list(module.parameters()) for module in skeleton.model.modules() if type(module).__name__ in names]
    inside = {id(weight) for layer in layers for weight in layer}
    return layers, [weight for weight in skeleton.model.parameters() if id(weight) not in inside]


def _whole(skeleton: Skeleton, weights: Iterable[nn.Parameter]) -> int:
    """Bytes of weights that are gathered, in what is computed in; 4-bit ones come as they are."""
    packed = skeleton.packed()
    widths = ((weight, NF4_CODE_BYTES if id(weight) in packed else skeleton.dtype.itemsize) for weight in weights)
    return int(sum(weight.numel() * width for weight, width in widths))


def _trained(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights if weight.requires_grad)


def _bytes(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def optimizer_bytes(weight: torch.Tensor, optimizer: str) -> int:
    """Return the bytes of AdamW's two states of a weight, as `torch.cuda.max_memory_allocated` counts them.

    PyTorch's are of the weight's dtype. Paged ones of bitsandbytes lie in unified memory, which is not counted.
    """
    return 0 if optimizer.startswith("paged") else 2 * weight.numel() * weight.element_size()
