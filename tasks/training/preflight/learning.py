"""Checks (f), (g) and (i): images matter to the loss, training moves the model, at a rate that suits its weights."""

from typing import Any

import torch
from peft import PeftModel
from PIL import Image

from tasks.training.optimizer import parameter_groups
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.losses import row_losses, undisturbed
from tasks.training.preflight.setup import Row, Setup
from tasks.training.recipe import HIGHEST_4BIT_LEARNING_RATE

IMAGES, LEARNING, RATE = "images", "learning", "learning rate"
LEAST_CHANGE = 1e-4
"""Least mean change of a row's loss when it gets another image, nats; a model that ignores images has exactly 0."""
STEPS = 6
ENOUGH = 0.01
"""Share of the loss that it must fall by for the overfitting to end early."""
SWAPPED_ROWS = 4
KNOWN = 0.01
"""Loss below which there is nothing left to learn from the rows, nats per token."""


def check_images(setup: Setup) -> list[Finding]:
    """Give each row the image of another, in its own image's size, and see whether that changes the loss."""
    rows = [row for row in setup.rows() if row["images"]][:SWAPPED_ROWS]
    swapped = _with_images_swapped(rows)
    wanted = f"another image of the same size changes a sample's loss by more than {LEAST_CHANGE} nats on average"
    if swapped is None:
        remedy = "Show the model different images, or it can't learn to look at them."
        return [Finding(IMAGES, f"{len(rows)} samples", "noted", "all have the same image", wanted, remedy)]
    with undisturbed(setup.model), torch.no_grad():
        setup.model.eval()
        losses, others = (_losses(setup, _batches(setup, them)) for them in (rows, swapped))
    change = float((losses - others).abs().mean())
    return [
        Finding.judge(
            IMAGES,
            f"{len(rows)} samples",
            change > LEAST_CHANGE,
            measured=f"changes by {change:.2g} nats",
            wanted=wanted,
            remedy="The model does not see the images: check that the collator passes pixel_values on, and that vision "
            "tower and projector have their weights.",
        )
    ]


def check_learning(setup: Setup) -> list[Finding]:
    """Overfit the checked rows for a few steps at the recipe's learning rate, and put the weights back."""
    with undisturbed(setup.model):
        if setup.checkpointing is None:
            return _overfit(setup)
        with setup.checkpointing():
            return _overfit(setup)


def check_learning_rate(setup: Setup) -> list[Finding]:
    """Refuse a high learning rate on a 4-bit base, unless the recipe says that it is meant."""
    recipe, four_bit = setup.recipe, setup.placement.four_bit
    highest = max(recipe.learning_rate_of(part) for part in recipe.trained_parts)
    limit = f"at most {HIGHEST_4BIT_LEARNING_RATE:g}"
    asked = f"Set learning_rate to {limit}, or allow_high_learning_rate: true if it is meant."
    allowed = "The recipe allows it: watch the loss, and compare with a lower one."
    return [
        Finding.judge(
            RATE,
            "recipe",
            not four_bit or highest <= HIGHEST_4BIT_LEARNING_RATE,
            measured=f"{highest:g}",
            wanted=f"{limit} on a 4-bit base, or allow_high_learning_rate" if four_bit else "any: no 4-bit base",
            remedy=allowed if recipe.allow_high_learning_rate else asked,
            otherwise="noted" if recipe.allow_high_learning_rate else "failed",
        )
    ]


def _with_images_swapped(rows: list[Row]) -> list[Row] | None:
    """The rows, each with the first image of the next row whose image is another one; None if there is no other."""
    first = [row["images"][0].convert("RGB") for row in rows]
    swapped: list[Row] = []
    for at, row in enumerate(rows):
        others: list[Any] = [first[(at + step) % len(rows)].resize(first[at].size) for step in range(1, len(rows))]
        other = next((image for image in others if image.tobytes() != first[at].tobytes()), None)
        if other is not None:
            assert isinstance(other, Image.Image)
            swapped.append({**row, "images": [other, *row["images"][1:]]})
        else:
            swapped.append(row)
    return swapped if any(new is not old for new, old in zip(swapped, rows, strict=True)) else None


def _batches(setup: Setup, rows: list[Row]) -> list[dict[str, torch.Tensor]]:
    """The rows in batches as large as those of the training."""
    size = setup.recipe.batch_size
    return [setup.batch(rows[at : at + size]) for at in range(0, len(rows), size)]


def _losses(setup: Setup, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Each row's loss."""
    return torch.cat([row_losses(setup, batch) for batch in batches])


def _overfit(setup: Setup) -> list[Finding]:
    batches = _batches(setup, setup.rows())
    setup.model.train()
    losses = [_step(setup, batches)]
    findings = _adapter_matters(setup, batches[:1])
    while len(losses) <= STEPS and losses[-1] > (1 - ENOUGH) * losses[0]:
        losses.append(_step(setup, batches))
    known = losses[0] < KNOWN
    lost = (
        "Nothing learns at this learning rate, or its steps are too long: raise it if the loss stands still, lower it "
        "if the loss rises, and look at the trained layers."
    )
    findings.append(
        Finding.judge(
            LEARNING,
            f"overfitting {len(setup.rows())} samples",
            min(losses[1:], default=losses[0]) < losses[0],
            measured=f"loss {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {len(losses)}",
            wanted="a loss that falls",
            remedy="The samples are known by heart already." if known else lost,
            otherwise="noted" if known else "failed",
        )
    )
    return findings


def _step(setup: Setup, batches: list[dict[str, torch.Tensor]]) -> float:
    """Take Adam's first step: each part's learning rate along its gradients' signs; returns the loss before it."""
    rows, total = sum(len(batch["labels"]) for batch in batches), 0.0
    setup.model.zero_grad(set_to_none=True)
    for batch in batches:
        loss = row_losses(setup, batch).sum() / rows
        loss.backward()
        total += float(loss.detach())
    with torch.no_grad():
        for group in parameter_groups(setup.model, setup.recipe):
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.sub_(weight.grad.sign(), alpha=group["lr"])
    return total


def _adapter_matters(setup: Setup, batches: list[dict[str, torch.Tensor]]) -> list[Finding]:
    """Whether the adapter, one step old, changes what the model says."""
    if not isinstance(setup.model, PeftModel):
        return []
    with torch.no_grad():
        on = _losses(setup, batches)
        with setup.model.disable_adapter():
            off = _losses(setup, batches)
    change = float((on - off).abs().max())
    return [
        Finding.judge(
            LEARNING,
            "adapter after one step",
            change > 0,
            measured=f"on and off differ by {change:.2g} nats at most",
            wanted="a difference",
            remedy="The adapter does nothing: look at the trained layers, and at the learning rate.",
        )
    ]
