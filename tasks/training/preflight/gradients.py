"""Check (e): gradients with checkpointing equal gradients without; where they don't, the loss looks the same."""

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from tasks.training.preflight.finding import Finding
from tasks.training.preflight.losses import row_losses, trainable, undisturbed
from tasks.training.preflight.setup import Row, Setup

CHECKPOINTING = "checkpointing"
LEAST_COSINE = 0.999
SAMPLED = 64
"""Most weight tensors whose gradients are kept for comparison."""
ROWS = 2
NUDGE = 0.02
"""Standard deviation of what stands in for LoRA's zeros, which would keep the gradients of the other half zero."""

WANTED = f"cosine of at least {LEAST_COSINE} with the gradients without checkpointing"
REMEDY = (
    "Checkpoint with use_reentrant=False (layers that share keys and values get wrong gradients otherwise), or train "
    "without checkpointing."
)


def check_gradients(setup: Setup) -> list[Finding]:
    """Compare the gradients of sampled trained weights on two rows, with and without checkpointing."""
    if setup.checkpointing is None:
        return [Finding(CHECKPOINTING, "gradients", "ok", "the recipe does without", WANTED)]
    rows = setup.rows()[:ROWS]
    with undisturbed(setup.model):
        _nudge_zeros(setup.model)
        names = _sample(list(trainable(setup.model)))
        try:
            plain = _gradients(setup, rows, names)
        except torch.OutOfMemoryError:
            measured = f"{len(rows)} samples don't fit without checkpointing, so there is nothing to compare with"
            return [Finding(CHECKPOINTING, "gradients", "noted", measured, WANTED, "Compare on a larger device.")]
        with setup.checkpointing():
            checkpointed = _gradients(setup, rows, names)
    noise = torch.finfo(setup.placement.dtype).eps * max(float(gradient.norm()) for gradient in plain.values())
    cosines = {name: _cosine(plain[name], checkpointed[name], noise=noise) for name in names}
    worst = min(cosines, key=lambda name: cosines[name])
    wrong = sum(cosine < LEAST_COSINE for cosine in cosines.values())
    return [
        Finding.judge(
            CHECKPOINTING,
            "gradients",
            wrong == 0,
            measured=f"cosine {cosines[worst]:.4f} at worst ({worst}), {wrong} of {len(names)} tensors below the limit",
            wanted=WANTED,
            remedy=REMEDY,
        )
    ]


def _nudge_zeros(model: nn.Module) -> None:
    torch.manual_seed(0)
    for weight in trainable(model).values():
        if not weight.any():
            nn.init.normal_(weight, std=NUDGE)


def _sample(names: list[str]) -> list[str]:
    count = min(SAMPLED, len(names))
    return [names[at * len(names) // count] for at in range(count)]


def _gradients(setup: Setup, rows: list[Row], names: list[str]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # where a model drops attention, both times the same
    setup.model.train()  # layers are only checkpointed in training
    setup.model.zero_grad(set_to_none=True)
    row_losses(setup, setup.batch(rows)).mean().backward()
    weights = trainable(setup.model)
    found = {name: weights[name].grad for name in names}
    return {
        name: torch.zeros(1) if gradient is None else gradient.detach().float().flatten().cpu()
        for name, gradient in found.items()
    }


def _cosine(left: torch.Tensor, right: torch.Tensor, *, noise: float) -> float:
    """1 for equal directions; two gradients no longer than `noise` are equal: what is left of them is rounding."""
    if max(float(left.norm()), float(right.norm())) <= noise:
        return 1.0
    if left.shape != right.shape:
        return 0.0
    return float(cosine_similarity(left, right, dim=0))
