"""A model that ignores its images, an adapter that does nothing, a rate that teaches nothing: each fails."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy

from tasks.training.collate import CompletionCollator
from tasks.training.preflight.learning import check_images, check_learning, check_learning_rate
from tasks.training.preflight.losses import row_losses
from tasks.training.preflight.setup import Setup

Make = Callable[..., Setup]


def test_row_losses_are_those_of_all_logits(shared_setup: Setup) -> None:
    batch = shared_setup.batch(shared_setup.rows()[:3])
    with torch.no_grad():
        losses = row_losses(shared_setup, batch)
        logits = shared_setup.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    for row in range(3):
        expected = cross_entropy(logits[row, :-1], batch["labels"][row, 1:])
        assert losses[row].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_sees_its_images_passes(shared_setup: Setup) -> None:
    [finding] = check_images(shared_setup)
    assert finding.status == "ok"


def test_images_that_never_reach_the_model_fail(shared_setup: Setup) -> None:
    class Blind(CompletionCollator):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            return {name: value for name, value in batch.items() if name not in ("pixel_values", "image_position_ids")}

    blind = Blind(shared_setup.processor, completion_only_loss=True, stop_ids=shared_setup.collator.stop_ids)
    [finding] = check_images(replace(shared_setup, collator=blind))
    assert finding.status == "failed"
    assert finding.measured == "changes by 0 nats"


def test_a_projector_without_weights_fails(own_setup: Make) -> None:
    setup = own_setup()
    setup.base.model.embed_vision.embedding_projection.weight.data.zero_()
    assert [finding.status for finding in check_images(setup)] == ["failed"]


def test_a_single_image_can_not_tell(shared_setup: Setup) -> None:
    row = shared_setup.examples[0]
    same = Dataset.from_list([row, row, row], features=shared_setup.examples.features)
    [finding] = check_images(replace(shared_setup, examples=same))
    assert (finding.status, finding.measured) == ("noted", "all have the same image")


def test_learning_moves_adapter_and_loss_and_leaves_no_trace(own_setup: Make) -> None:
    setup = own_setup()
    before = {name: weight.clone() for name, weight in setup.model.state_dict().items()}
    found = check_learning(setup)
    assert [finding.status for finding in found] == ["ok", "ok"]
    assert all(torch.equal(weight, before[name]) for name, weight in setup.model.state_dict().items())
    assert all(weight.grad is None for weight in setup.model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in setup.model.modules())


def test_what_is_overfitted_does_not_reach_the_training(own_setup: Make) -> None:
    """A training after the checks takes the very steps of one without."""

    def one_step(setup: Setup) -> torch.Tensor:
        setup.model.train()
        torch.manual_seed(1)  # dropout
        row_losses(setup, setup.batch(setup.rows()[:2])).mean().backward()
        return torch.cat([w.grad.flatten() for w in setup.model.parameters() if w.grad is not None])

    torch.manual_seed(0)
    checked = own_setup()
    torch.manual_seed(0)
    fresh = own_setup()
    check_learning(checked)
    assert torch.equal(one_step(checked), one_step(fresh))


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never learns need not try for long."""
    monkeypatch.setattr("tasks.training.preflight.learning.STEPS", 1)


@pytest.mark.usefixtures("one_step")
def test_a_learning_rate_of_nothing_fails(own_setup: Make) -> None:
    found = {f.subject: f for f in check_learning(own_setup(learning_rate=1e-12))}
    assert found["overfitting 8 samples"].status == "failed"
    assert "learning rate" in found["overfitting 8 samples"].remedy


def test_each_part_learns_at_its_own_rate(own_setup: Make) -> None:
    found = check_learning(own_setup(learning_rate=1e-12, learning_rates={"language": 1e-3}))
    assert [finding.status for finding in found] == ["ok", "ok"]


@pytest.mark.usefixtures("one_step")
def test_an_adapter_that_changes_nothing_fails(own_setup: Make) -> None:
    setup = own_setup()
    for module in setup.model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = 0.0
    found = {f.subject: f for f in check_learning(setup)}
    assert found["adapter after one step"].status == "failed"
    assert found["overfitting 8 samples"].status == "failed"


def test_a_loss_that_is_no_number_fails(own_setup: Make) -> None:
    setup = own_setup()
    setup.base.model.embed_vision.embedding_projection.weight.data.fill_(torch.nan)
    found = {f.subject: f for f in check_learning(setup)}
    assert (found["overfitting 8 samples"].status, "loss nan" in found["overfitting 8 samples"].measured) == (
        "failed",
        True,
    )


def test_a_training_in_full_is_checked_without_an_adapter(own_setup: Make) -> None:
    setup = own_setup(
        lambda base: base.requires_grad_(True), method="full", full_parts=("language",), learning_rate=1e-4
    )
    assert [(f.subject, f.status) for f in check_learning(setup)] == [("overfitting 8 samples", "ok")]


@pytest.mark.parametrize(
    ("quantization", "rate", "allowed", "status"),
    [
        ("nf4", 5e-5, False, "ok"),
        ("nf4", 2e-4, False, "failed"),
        ("nf4", 2e-4, True, "noted"),
        ("none", 2e-4, False, "ok"),
    ],
)
def test_a_high_rate_on_a_four_bit_base_must_be_meant(
    shared_setup: Setup, quantization: str, rate: float, allowed: bool, status: str
) -> None:
    recipe = shared_setup.recipe.model_copy(update={"learning_rate": rate, "allow_high_learning_rate": allowed})
    placement = replace(shared_setup.placement, four_bit=quantization == "nf4")
    [finding] = check_learning_rate(replace(shared_setup, recipe=recipe, placement=placement))
    assert (finding.status, finding.measured) == (status, f"{rate:g}")


def test_the_highest_rate_of_any_part_counts(shared_setup: Setup) -> None:
    rates = {"learning_rate": 1e-5, "learning_rates": {"projector": 1e-3}, "full_parts": ("projector",)}
    rates |= {"allow_high_learning_rate": False}
    setup = replace(
        shared_setup,
        recipe=shared_setup.recipe.model_copy(update=rates),
        placement=replace(shared_setup.placement, four_bit=True),
    )
    assert [finding.status for finding in check_learning_rate(setup)] == ["failed"]
