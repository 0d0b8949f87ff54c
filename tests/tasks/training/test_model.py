"""What is 4-bit and what gets LoRA, on the shipped Gemma 4 and on a LLaVA, whose parts have other names."""

import json
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from transformers import (
    AutoModelForMultimodalLM,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from tasks.training import model as models
from tasks.training.recipe import Recipe, RecipeError

LANGUAGE = "model.language_model.layers."
PROJECTIONS = "(q|k|v|o|gate|up|down)_proj"


@pytest.fixture(scope="module")
def llava() -> PreTrainedModel:
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=28, patch_size=14)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**small, vocab_size=64))
    )


def four_bit(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"quantization": "nf4"})


@pytest.fixture(scope="module")
def quantized(gemma: Path, recipe: Recipe) -> PreTrainedModel:
    return models.load_model(gemma, models.place(four_bit(recipe)))


def test_nf4_holds_the_language_models_linears_and_nothing_else_in_four_bits(quantized: PreTrainedModel) -> None:
    kinds = {name: type(module) for name, module in models.linear_names(quantized).items()}
    in_four_bits = {name for name, kind in kinds.items() if kind is bitsandbytes.nn.Linear4bit}
    assert in_four_bits == {name for name in kinds if name.startswith(LANGUAGE)}
    assert kinds["lm_head"] is torch.nn.Linear
    assert any("vision_tower" in name for name in set(kinds) - in_four_bits)


def test_nf4_is_double_quantized(quantized: PreTrainedModel) -> None:
    state = quantized.get_submodule(f"{LANGUAGE}0.mlp.up_proj").weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)


def test_an_output_head_tied_to_the_embeddings_stays_tied(quantized: PreTrainedModel) -> None:
    assert quantized.get_output_embeddings().weight.data_ptr() == quantized.get_input_embeddings().weight.data_ptr()


def test_a_quantized_vision_tower_is_noticed(gemma: Path) -> None:
    plain = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForMultimodalLM.from_pretrained(gemma, quantization_config=plain)
    with pytest.raises(models.ModelError, match=r"are 4-bit but should not be.*vision_tower"):
        models.check_quantization(model, four_bit=True)


def test_a_model_that_was_not_quantized_is_noticed(gemma: Path, recipe: Recipe) -> None:
    model = models.load_model(gemma, models.place(recipe))
    with pytest.raises(models.ModelError, match="4-bit"):
        models.check_quantization(model, four_bit=True)


def test_everything_beside_the_decoder_is_skipped(llava: PreTrainedModel) -> None:
    assert models.decoder_name(llava) == "model.language_model"
    assert models.modules_beside_decoder(llava) == ["lm_head", "model.vision_tower", "model.multi_modal_projector"]


def test_lora_targets_leave_out_vision_layers_of_the_same_name(llava: PreTrainedModel) -> None:
    same_name = [name for name in models.linear_names(llava) if name.endswith("q_proj")]
    assert any("vision_tower" in name for name in same_name)
    found = models.lora_targets(llava, PROJECTIONS)
    assert len(found) == 7
    assert all(name.startswith(LANGUAGE) for name in found)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora_sits_on_all_the_language_models_projections(gemma: Path, recipe: Recipe, quantization: str) -> None:
    chosen = recipe.model_copy(update={"quantization": quantization})
    base = models.load_model(gemma, models.place(chosen))
    projections = {name for name in models.linear_names(base) if name.startswith(LANGUAGE)}
    adapted = models.add_lora(base, chosen, base_model="the name")
    assert set(models.lora_names(adapted)) == projections
    assert all("lora_" in name for name, weight in adapted.named_parameters() if weight.requires_grad)
    assert adapted.peft_config["default"].base_model_name_or_path == "the name"


def test_a_pattern_that_matches_nothing_lists_the_layers(gemma: Path, recipe: Recipe) -> None:
    base = models.load_model(gemma, models.place(recipe))
    with pytest.raises(
        RecipeError, match=r"lora_targets: 'query' matches no linear layer.*Layers: down_proj, gate_proj"
    ):
        models.add_lora(base, recipe.model_copy(update={"lora_targets": "query"}), base_model="m")


def test_a_pattern_that_is_none_is_refused(gemma: Path, recipe: Recipe) -> None:
    base = models.load_model(gemma, models.place(recipe))
    with pytest.raises(RecipeError, match="is not a regular expression"):
        models.lora_targets(base, "(q")


def test_on_a_cpu_auto_means_unquantized_fp32_and_says_so(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with caplog.at_level("INFO"):
        placement = models.place(recipe)
    assert (placement.device.type, placement.dtype, placement.four_bit) == ("cpu", torch.float32, False)
    assert "no GPU: the base model is not quantized" in caplog.text


def test_the_bound_on_image_tokens_reaches_the_processor(gemma: Path, recipe: Recipe) -> None:
    processor = models.load_processor(gemma, recipe.model_copy(update={"max_image_tokens": 140}))
    assert (processor.image_processor.max_soft_tokens, processor.image_seq_length) == (140, 140)


def test_a_processor_without_chat_template_is_refused(gemma: Path, recipe: Recipe, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(gemma, tmp_path / "gemma"))
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(models.ModelError, match="has no chat template"):
        models.load_processor(copy, recipe)


def test_code_that_comes_with_a_model_is_not_run(gemma: Path, recipe: Recipe, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(gemma, tmp_path / "gemma"))
    config = json.loads((copy / "config.json").read_text())
    trap = tmp_path / "trap"
    (copy / "own.py").write_text(f"open({str(trap)!r}, 'w')\n")
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForMultimodalLM": "own.Model"}}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="contains custom code"):
        models.load_model(copy, models.place(recipe))
    assert not trap.exists()
