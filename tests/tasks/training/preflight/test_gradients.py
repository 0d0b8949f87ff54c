"""Reentrant checkpointing gives wrong gradients where layers share keys and values, at the very same loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from tasks.training.preflight.gradients import check_gradients
from tasks.training.preflight.setup import Setup

Make = Callable[..., Setup]


@contextmanager
def reentrant(model: Any) -> Iterator[None]:
    """What preparing a model for k-bit training switches on."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@pytest.fixture(scope="module")
def sharing(gemma: Any) -> PreTrainedModel:
    """A tiny Gemma 4 whose last two layers use the keys and values of the first two, as in E2B and E4B."""
    config = AutoConfig.from_pretrained(gemma)
    text = config.text_config.to_dict() | {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": None,
        "attention_k_eq_v": False,
    }
    config.text_config = type(config.text_config)(**text)
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def test_the_trainers_checkpointing_passes(shared_setup: Setup) -> None:
    [finding] = check_gradients(shared_setup)
    assert finding.status == "ok"
    assert finding.measured.startswith("cosine 1.0000")


def test_reentrant_checkpointing_fails_on_shared_keys_and_values(own_setup: Make, sharing: PreTrainedModel) -> None:
    sound = own_setup(base=sharing)
    assert [finding.status for finding in check_gradients(sound)] == ["ok"]
    [finding] = check_gradients(replace(sound, checkpointing=partial(reentrant, sound.model)))
    assert finding.status == "failed"
    assert "use_reentrant=False" in finding.remedy


def test_weights_seed_and_modes_are_left_as_they_were(own_setup: Make) -> None:
    setup = own_setup()
    model = setup.model
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_gradients(setup)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in setup.model.modules())


def test_a_recipe_without_checkpointing_has_nothing_to_compare(shared_setup: Setup) -> None:
    [finding] = check_gradients(replace(shared_setup, checkpointing=None))
    assert (finding.status, finding.measured) == ("ok", "the recipe does without")


def test_what_does_not_fit_without_checkpointing_is_noted(
    own_setup: Make, monkeypatch: pytest.MonkeyPatch, shared_setup: Setup
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("tasks.training.preflight.gradients._gradients", full)
    assert [finding.status for finding in check_gradients(shared_setup)] == ["noted"]


def test_gradients_that_are_nothing_but_rounding_are_no_difference(own_setup: Make) -> None:
    setup = own_setup()
    noise = torch.Generator().manual_seed(3)
    weight = next(weight for weight in setup.model.parameters() if weight.requires_grad)
    weight.register_hook(lambda gradient: torch.randn(gradient.shape, generator=noise) * 1e-9)
    assert [finding.status for finding in check_gradients(setup)] == ["ok"]


def test_attention_that_is_dropped_is_dropped_alike_both_times(own_setup: Make) -> None:
    setup = own_setup()
    for module in setup.base.get_decoder().modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    assert [finding.status for finding in check_gradients(setup)] == ["ok"]
