"""Shares a model out among processes so that no GPU ever holds more of it than its part and one weight more.

The first process holds the model whole in the machine's memory, the others hold its modules without weights.
"""

from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from tasks.training.ranks import is_first, world_size

FIRST = 0


def share_out(model: PeftModel | PreTrainedModel, accelerator: Accelerator, *, trained: torch.dtype) -> None:
    """Leave each process its part of every weight on its GPU, as accelerate's FSDP2 divides them.

    `model` lies on the CPU in the first process and on `meta` in all others. Weights with gradients become `trained`,
    all others keep their dtype. Buffers are whole everywhere. All processes must call it. Accelerate's own loading on
    the CPU (`cpu_ram_efficient_loading`) fails on saved buffers, which Gemma 4 has, and sends whole weights.
    """
    weights = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    loaded = {name: weight.dtype for name, weight in weights.items()}
    whole = {name: weight.detach() for name, weight in weights.items()} if is_first() else {}
    del weights
    model.to("meta")  # type: ignore[arg-type] # a device is what it takes
    model.tie_weights()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(trained)
    fsdp2_prepare_model(accelerator, model)
    filled: dict[int, nn.Parameter] = {}
    for name, weight in model.named_parameters():
        shared = cast(DTensor, weight)
        part = _part(shared, whole.pop(name, None), dtype=loaded[name], device=accelerator.device)
        filled[id(weight)] = nn.Parameter(part, requires_grad=weight.requires_grad)
    tied = model.named_parameters(remove_duplicate=False)
    model.load_state_dict({name: filled[id(weight)] for name, weight in tied}, strict=False, assign=True)
    model.tie_weights()
    for name, buffer in buffers.items():
        _set_buffer(model, name, _sent(buffer, accelerator.device))


def _part(weight: DTensor, whole: Tensor | None, *, dtype: torch.dtype, device: torch.device) -> DTensor:
    """This process's part of a weight, from the first process, which gives it `whole`."""
    part = torch.empty(weight.to_local().shape, dtype=weight.dtype, device=device)
    if whole is not None:
        for receiver, rows in enumerate(whole.contiguous().chunk(world_size())):  # as FSDP2 does; the last may get none
            if receiver == FIRST:
                part.copy_(rows.to(device))  # in this order it is cast on the GPU
            else:
                dist.send(rows.to(device), receiver)
    elif part.numel():
        received = torch.empty(part.shape, dtype=dtype, device=device)
        dist.recv(received, FIRST)
        part.copy_(received)
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _sent(buffer: Tensor, device: torch.device) -> Tensor:
    """The first process's buffer, in every process."""
    sent = buffer.to(device) if is_first() else torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    dist.broadcast(sent, FIRST)
    return sent


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = value  # registering it anew would forget whether it is saved
