"""The loss of single rows, and a model that is left exactly as it was after trying things with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tasks.training.collate import IGNORED
from tasks.training.preflight.setup import Setup


def row_losses(setup: Setup, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return each row's mean loss over its supervised tokens, nats, float32 of shape (rows,).

    Logits are computed only where some row has a supervised token: of a vocabulary of 262,144 all would be gigabytes.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    at = (labels != IGNORED).any(dim=0).nonzero().flatten()
    device = setup.placement.device.type
    with torch.autocast(device, setup.placement.dtype, enabled=setup.placement.dtype == torch.bfloat16):
        logits = setup.model(**inputs, logits_to_keep=at - 1, use_cache=False).logits
    wanted = labels[:, at]
    losses = cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(wanted.shape).sum(dim=1) / (wanted != IGNORED).sum(dim=1).clamp(min=1)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that training changes, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Try things with a model, without dropout: afterwards its weights, modes, gradients and the seed are as before."""
    weights = {name: weight.detach().to("cpu", copy=True) for name, weight in trainable(model).items()}
    modes = {module: module.training for module in model.modules()}
    dropouts = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for dropout in dropouts:
        dropout.p = 0.0
    devices = sorted({weight.device.index or 0 for weight in model.parameters() if weight.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for name, weight in trainable(model).items():
            weight.data.copy_(weights[name])
            weight.grad = None
        for module, mode in modes.items():
            module.training = mode
        for dropout, p in dropouts.items():
            dropout.p = p
