"""LoRA on the vision tower, a tower in 4 bits, clipping gone around LoRA: each fails; plain counts judge the table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForMultimodalLM, BitsAndBytesConfig, PreTrainedModel

from tasks.training import model as models
from tasks.training.full import train_in_full
from tasks.training.model import Placement
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.layers import check_quantization, check_targets
from tasks.training.preflight.modules import OTHER, module_table
from tasks.training.preflight.setup import Setup
from tasks.training.recipe import Recipe
from tests.tasks.training.tiny_models import write

Make = Callable[..., Setup]


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def lora(targets: Any, **options: Any) -> Callable[[PreTrainedModel], Any]:
    return lambda base: get_peft_model(base, LoraConfig(r=4, target_modules=targets, **options))


def test_lora_where_the_recipe_means_it_passes(shared_setup: Setup) -> None:
    found = by_subject(check_targets(shared_setup))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert set(found) == {"language", "projector", "vision", "head"}
    assert "LoRA on 27 of 27 linear layers" in found["language"].measured


def test_lora_on_the_vision_tower_fails(own_setup: Make) -> None:
    found = by_subject(check_targets(own_setup(lora("all-linear"))))
    assert (found["vision"].status, found["projector"].status, found["language"].status) == ("failed", "failed", "ok")
    assert "LoRA on 22 of 22 linear layers" in found["vision"].measured
    assert "lora_parts" in found["vision"].remedy


def test_lora_that_misses_layers_of_the_pattern_fails(own_setup: Make) -> None:
    found = by_subject(check_targets(own_setup(lora(r".*language_model\..*\.q_proj"))))
    assert found["language"].status == "failed"
    assert "LoRA on 4 of 27" in found["language"].measured
    assert "the 27 that match" in found["language"].wanted


def test_weights_trained_beside_lora_unasked_fail(own_setup: Make) -> None:
    spoiled = lora(r".*language_model\..*_proj", modules_to_save=["embedding_projection"])
    assert by_subject(check_targets(own_setup(spoiled)))["projector"].status == "failed"
    asked = own_setup(spoiled, full_parts=("projector",))
    assert by_subject(check_targets(asked))["projector"].status == "ok"
    [both] = [row for row in module_table(asked.base) if row.part == "projector" and row.module != OTHER]
    assert (both.module, both.layers) == ("embedding_projection", 2)  # the frozen one and the copy beside it
    assert both.trained_weights * 2 == both.weights


def test_the_table_counts_every_weight_once(shared_setup: Setup) -> None:
    table = module_table(shared_setup.base)
    lora_weights = sum(p.numel() for n, p in shared_setup.base.named_parameters() if "lora_" in n)
    assert sum(row.adapter_weights for row in table) == lora_weights
    every = sum(p.numel() for p in shared_setup.base.parameters())
    assert sum(row.weights + row.adapter_weights for row in table) == every
    assert sum(row.adapted for row in table) == 27


def test_the_table_unpacks_four_bit_weights(gemma: Any, own_setup: Make, shared_setup: Setup) -> None:
    table = module_table(own_setup(quantization="nf4").base)
    plain = {(row.part, row.module): row.weights for row in module_table(shared_setup.base)}
    assert {(row.part, row.module): row.weights for row in table} == plain
    assert {row.part for row in table if row.four_bit} == {"language"}
    assert {row.kind for row in table if row.four_bit} == {"Linear4bit"}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_weights_held_as_the_recipe_says_pass(own_setup: Make, quantization: str) -> None:
    found = check_quantization(own_setup(quantization=quantization))
    assert {finding.status for finding in found} == {"ok"}


def trapped(gemma: Any, skip: list[str] | None) -> PreTrainedModel:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)
    model = AutoModelForMultimodalLM.from_pretrained(gemma, quantization_config=config, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    return model


def test_a_vision_tower_that_the_list_of_modules_to_skip_misses_fails(gemma: Any, own_setup: Make) -> None:
    setup = own_setup(base=trapped(gemma, ["vision_tower"]), quantization="nf4")
    found = by_subject(check_quantization(setup))
    assert found["vision"].status == "failed"
    assert "22 of 22 linear layers 4-bit" in found["vision"].measured
    assert found["head"].status == "failed"  # a list of one's own also loses the default, which spares the head
    assert found["language"].status == "ok"


def test_a_language_model_that_was_not_quantized_fails(own_setup: Make, gemma: Any) -> None:
    plain = AutoModelForMultimodalLM.from_pretrained(gemma, dtype=torch.float32)
    found = by_subject(check_quantization(own_setup(base=plain, quantization="nf4")))
    assert found["language"].status == "failed"
    assert "0 of 27 linear layers 4-bit" in found["language"].measured


def test_what_preparing_for_k_bit_training_leaves_in_fp32_is_noted(gemma: Any, own_setup: Make) -> None:
    bf16 = models.load_model(gemma, models.Placement(torch.device("cpu"), torch.bfloat16, four_bit=True))
    bf16.resize_token_embeddings(8192, mean_resizing=False)  # enough of them to weigh something
    clean = own_setup(base=bf16, quantization="nf4", precision="bf16")
    wide = "language, frozen weights in fp32"
    assert wide not in by_subject(check_quantization(clean))
    prepare_model_for_kbit_training(clean.base)
    assert by_subject(check_quantization(clean))[wide].status == "noted"


def test_a_language_model_that_is_mostly_embeddings_is_noted(own_setup: Make, gemma: Any) -> None:
    base = models.load_model(gemma, models.Placement(torch.device("cpu"), torch.bfloat16, four_bit=True))
    base.resize_token_embeddings(8192, mean_resizing=False)
    found = by_subject(check_quantization(own_setup(base=base, quantization="nf4", precision="bf16")))
    assert found["language, not in linear layers"].status == "noted"


class Clipped(nn.Linear):
    """A clipping layer that passes for a linear one, as a patch would have it to get LoRA on it."""

    use_clipped_linears = True


@pytest.fixture
def clipping(gemma: Any) -> PreTrainedModel:
    """The tiny Gemma 4 with its vision tower's activations clipped, as E2B's and E4B's are."""
    config = AutoConfig.from_pretrained(gemma)
    config.vision_config.use_clipped_linears = True
    model = AutoModelForMultimodalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model


def test_clipping_is_kept_when_lora_sits_inside(clipping: PreTrainedModel, own_setup: Make) -> None:
    setup = own_setup(lora("all-linear"), base=clipping, lora_parts=("language", "vision", "projector"))
    found = by_subject(check_targets(setup))
    assert found["clipping"].status == "ok"
    assert "kept around 21 layers" in found["clipping"].measured
    assert found["vision"].status == "ok"


def test_clipping_that_lora_goes_around_fails(clipping: PreTrainedModel, own_setup: Make) -> None:
    tower = clipping.model.vision_tower
    for name, module in list(tower.named_modules()):
        if name.endswith("q_proj"):
            tower.set_submodule(name, Clipped(module.linear.in_features, module.linear.out_features, bias=False))
    setup = own_setup(lora(r".*vision_tower.*q_proj"), base=clipping, lora_parts=("vision",))
    found = by_subject(check_targets(setup))
    assert found["clipping"].status == "failed"
    assert "bypassed in 3 (q_proj)" in found["clipping"].measured


def test_a_language_model_in_full_is_trained_with_its_head(own_setup: Make, tmp_path: Path) -> None:
    """LLaVA, Qwen-VL and SmolVLM have a head of its own weights, which `method: full` trains too."""
    base = models.load_model(write("llava clip llama", tmp_path), Placement(torch.device("cpu"), torch.float32, False))
    full = {"method": "full", "full_parts": ("language",)}
    setup = own_setup(lambda base: train_in_full(base, Recipe(base_model="m", **full)), base=base, **full)
    found = by_subject(check_targets(setup))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert "0.02 M of 0.02 M own weights trained" in found["head"].measured
