"""Says what a model takes in NF4, and refuses those that don't fit a GPU although the recipe asks for 4 bits.

bitsandbytes quantises linear layers; experts that are stacked in one tensor are none, and stay as they are.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from tasks.training.families import ModelError, decoder_name

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight takes in NF4 with double quantisation: itself, and its share of the two levels of scales."""


def bytes_in_nf4(skeleton: PreTrainedModel, dtype: torch.dtype) -> float:
    """Return what a model's weights take with the linears of its language model in NF4 and all others in `dtype`."""
    decoder = skeleton.get_submodule(decoder_name(skeleton))
    linears = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear))
    return linears * NF4_BYTES + (skeleton.num_parameters() - linears) * dtype.itemsize


def check_fits_in_nf4(skeleton: PreTrainedModel, memory: int, *, dtype: torch.dtype) -> None:
    """Raise `ModelError` if a model doesn't fit `memory` bytes, those of one GPU, even in NF4.

    `skeleton` is the model without weights, all that is not quantised in `dtype`. GPUs that share a 4-bit model don't
    need less: each loads all of it first.
    """
    decoder = skeleton.get_submodule(decoder_name(skeleton))
    experts = sum(weight.numel() for weight in decoder.parameters() if weight.dim() > 2)
    size = bytes_in_nf4(skeleton, dtype)
    if size <= memory:
        return
    too_large = (
        f"{type(skeleton).__name__} takes {size / 2**30:.1f} GiB even in NF4, and the GPU has {memory / 2**30:.1f} GiB"
    )
    if experts:
        raise ModelError(
            f"{too_large}: {experts * dtype.itemsize / 2**30:.1f} GiB of it are experts, which are no "
            f"linear layers and stay in {str(dtype).removeprefix('torch.')}. Use a larger GPU, or a model without "
            "experts, such as Gemma 4 E4B or 31B."
        )
    raise ModelError(
        f"{too_large}. Several GPUs don't help: each loads a 4-bit model whole before they share it. Use a larger GPU, "
        "or quantization: none with sharding: fsdp, of which each loads its part only."
    )
