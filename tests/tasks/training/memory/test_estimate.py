"""Predicted peaks beside a real step on a CPU, and beside what was measured on an H100."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tasks.training import model as models
from tasks.training.memory.estimate import Estimate, MemoryModel, Workload, checkpointed_layers, estimate
from tasks.training.memory.rehearsal import Allocations
from tasks.training.memory.skeleton import skeleton_of
from tasks.training.recipe import Recipe
from tests.tasks.training.memory.shapes import GIB, gemma_31b, gemma_e2b, gemma_e4b
from tests.tasks.training.tiny_models import MODELS

QLORA = Recipe(base_model="m", quantization="nf4", lora_dropout=0.0, accumulation=1)


@pytest.mark.parametrize(
    ("config", "gib", "billions"),
    [(gemma_31b(), 17.77, 31.27), (gemma_e4b(), 9.30, 7.94), (gemma_e2b(), 6.91, 5.10)],
    ids=["31B", "E4B", "E2B"],
)
def test_weights_in_nf4_are_those_of_the_published_sizes(config: AutoConfig, gib: float, billions: float) -> None:
    skeleton = skeleton_of(config, QLORA)
    assert skeleton.weight_bytes() / GIB == pytest.approx(gib, rel=0.002)
    trained = sum(weight.numel() for weight in skeleton.trained())
    assert (skeleton.model.num_parameters() - trained) / 1e9 == pytest.approx(billions, rel=0.002)


def test_adapters_have_rank_times_both_widths(gemma: Path) -> None:
    recipe = QLORA.model_copy(update={"lora_rank": 8})
    skeleton = skeleton_of(AutoConfig.from_pretrained(gemma), recipe)
    linears = models.linear_names(models.load_model(gemma, models.place(recipe))).items()
    names = [module for name, module in linears if "language_model.layers" in name]
    model = MemoryModel(skeleton, recipe)
    assert model.resting.adapters == 4 * sum(8 * (module.in_features + module.out_features) for module in names)
    assert model.resting.optimizer == 2 * model.resting.adapters


def test_paged_states_are_not_on_the_gpu(gemma: Path) -> None:
    recipe = QLORA.model_copy(update={"optimizer": "paged_adamw_8bit"})
    assert MemoryModel(skeleton_of(AutoConfig.from_pretrained(gemma), recipe), recipe).resting.optimizer == 0


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_on_a_cpu_peaks_as_predicted(gemma: Path, recipe: Recipe, checkpointed: bool) -> None:
    chosen = recipe.model_copy(
        update={"quantization": "none", "precision": "fp32", "lora_dropout": 0.0, "accumulation": 1, "lora_rank": 16}
    )
    model = models.add_lora(models.load_model(gemma, models.place(chosen)), chosen, base_model="m").train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.ones(4, 320, dtype=torch.long)
    mask = torch.ones(4, 1, 320, 320, dtype=torch.bool).tril()
    memory = Allocations()
    with memory:
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()

    found = estimate(
        AutoConfig.from_pretrained(gemma),
        chosen,
        batch=4,
        sample_tokens=320,
        images=0,
        compiled=False,
        checkpointed_share=float(checkpointed),
        logits="all",
    )
    resting = found.weights + found.adapters + found.optimizer
    assert found.peak_bytes - resting == pytest.approx(memory.peak, rel=0.1)


def test_the_31b_peaks_as_it_did_on_an_h100() -> None:
    """Compiled, 16 rows of 320 tokens with an image each, all layers computed again, bf16 adapters, 8-bit optimizer."""
    recipe = QLORA.model_copy(update={"optimizer": "paged_adamw_8bit"})
    found = estimate(gemma_31b(), recipe, batch=16, sample_tokens=320, adapter_dtype=torch.bfloat16)
    assert found.peak_bytes / GIB == pytest.approx(24.9, rel=0.1)


@pytest.fixture(scope="module")
def small() -> MemoryModel:
    return MemoryModel(skeleton_of(gemma_31b(layers=6), QLORA), QLORA)


def peak(model: MemoryModel, share: float = 1.0, **changes: int) -> Estimate:
    return model.estimate(Workload(**{"batch": 4, "sample_tokens": 512, **changes}), checkpointed_share=share)


def test_the_parts_make_up_the_peak(small: MemoryModel) -> None:
    found = peak(small)
    parts = (found.weights, found.adapters, found.optimizer, found.gradients, found.activations, found.working)
    assert found.peak_bytes == sum(parts) + found.logits + found.inputs
    assert str(found).startswith(f"{found.peak_bytes / GIB:.2f} GiB at the ")


def test_more_rows_longer_rows_and_less_recomputed_take_more(small: MemoryModel) -> None:
    least = peak(small).peak_bytes
    assert peak(small, batch=8).peak_bytes > least
    assert peak(small, sample_tokens=1024).peak_bytes > least
    assert peak(small, share=0.5).peak_bytes > least
    assert peak(small, share=0.0).peak_bytes > peak(small, share=0.5).peak_bytes


def test_eager_layers_take_more_than_compiled_ones(small: MemoryModel) -> None:
    eager = MemoryModel(small.skeleton, QLORA, compiled=False)
    assert peak(eager, share=0.0).activations > 1.3 * peak(small, share=0.0).activations


def test_gradients_are_held_through_a_step_of_several_passes(small: MemoryModel) -> None:
    several = small.with_accumulation(4)
    assert peak(several).gradients == several.resting.adapters
    assert peak(several).inputs == 4 * peak(small).inputs


def test_all_logits_take_more_than_those_with_a_label(small: MemoryModel) -> None:
    full = MemoryModel(small.skeleton, QLORA, logits="all")
    found = peak(full)
    assert found.moment == "loss"
    assert found.logits > 4 * 512 * 262144 * (2 + 4)
    assert found.peak_bytes > peak(small).peak_bytes


def test_layers_that_are_computed_again_are_spread_evenly(small: MemoryModel) -> None:
    layers = small._stack(Workload(1, 64)).layers
    assert checkpointed_layers(layers, 0.5) == {1, 3, 5}
    assert checkpointed_layers(layers, 1.0) == {0, 1, 2, 3, 4, 5}
    assert checkpointed_layers(layers, 0.0) == set()


@pytest.mark.parametrize("model", ["qwen2.5-vl", "gemma4 dense", "llava clip llama"])
def test_a_vision_tower_in_full_beside_lora_counts_as_one_in_full_alone(model: str) -> None:
    config, size = MODELS[model]()[1], {"batch": 2, "sample_tokens": 256, "image_tokens": 70}
    beside = Recipe(base_model="m", lora_rank=1, full_parts=("vision", "projector"), quantization="none")
    alone = Recipe(base_model="m", method="full", full_parts=("vision", "projector"))
    layers = [
        MemoryModel(skeleton_of(config, recipe), recipe)._rehearse(Workload(2, 256, 1, 70)).layers
        for recipe in (beside, alone)
    ]
    assert [sum(layer.vision for layer in stack) for stack in layers] == [2, 2]
    assert estimate(config, beside, **size).peak_bytes > estimate(config, alone, **size).peak_bytes
