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


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dora_learns_magnitudes_beside_the_matrices(gemma: Path, recipe: Recipe, quantization: str) -> None:
    chosen = recipe.model_copy(update={"use_dora": True, "quantization": quantization})
    adapted = models.add_lora(models.load_model(gemma, models.place(chosen)), chosen, base_model="m")
    layers = models.lora_names(adapted)
    magnitudes = [name for name, weight in adapted.named_parameters() if "magnitude" in name and weight.requires_grad]
    assert len(magnitudes) == len(layers) == len(models.lora_layers(adapted.unload(), chosen))


def scalings(gemma: Path, recipe: Recipe) -> dict[str, tuple[int, float]]:
    """Rank and scale of the LoRA on each layer."""
    adapted = models.add_lora(models.load_model(gemma, models.place(recipe)), recipe, base_model="m")
    base = adapted.get_base_model()
    found = {name: base.get_submodule(name) for name in models.lora_names(adapted)}
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in found.items()}


def test_the_scale_is_alpha_over_rank_and_over_its_root_with_rslora(gemma: Path, recipe: Recipe) -> None:
    wide = recipe.model_copy(update={"lora_rank": 16, "lora_alpha": 8})
    assert set(scalings(gemma, wide).values()) == {(16, 0.5)}
    assert set(scalings(gemma, wide.model_copy(update={"use_rslora": True})).values()) == {(16, 2.0)}


def test_patterns_give_some_layers_other_ranks_and_alphas(gemma: Path, recipe: Recipe) -> None:
    patterns = {"rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 8}, "alpha_pattern": {"down_proj": 6}}
    found = scalings(gemma, recipe.model_copy(update=patterns))
    assert found[f"{LANGUAGE}0.self_attn.q_proj"] == (8, 1.0)
    assert found[f"{LANGUAGE}1.self_attn.q_proj"] == (4, 2.0)
    assert {at for name, at in found.items() if name.endswith("down_proj")} == {(2, 3.0)}


@pytest.mark.parametrize(
    ("field", "pattern", "message"),
    [
        ("rank_pattern", "query", r"rank_pattern: 'query' matches the end of no layer that gets LoRA, such as model\."),
        ("alpha_pattern", "(q", r"alpha_pattern: '\(q' is not a regular expression"),
    ],
)
def test_patterns_that_match_nothing_are_refused(
    gemma: Path, recipe: Recipe, field: str, pattern: str, message: str
) -> None:
    base = models.load_model(gemma, models.place(recipe))
    with pytest.raises(RecipeError, match=message):
        models.add_lora(base, recipe.model_copy(update={field: {pattern: 3}}), base_model="m")


def test_the_adapter_names_its_layers_without_their_numbers(gemma: Path, recipe: Recipe) -> None:
    adapted = models.add_lora(models.load_model(gemma, models.place(recipe)), recipe, base_model="m")
    pattern = adapted.peft_config["default"].target_modules
    assert r"model\.language_model\.layers\.\d+\.mlp\.up_proj" in pattern.split("|")
    assert len(pattern.split("|")) == 7


def test_a_training_that_starts_from_another_has_its_own_dropout(gemma: Path, recipe: Recipe, tmp_path: Path) -> None:
    placement = models.place(recipe)
    models.add_lora(models.load_model(gemma, placement), recipe, base_model="m").save_pretrained(str(tmp_path))
    dropping = recipe.model_copy(update={"lora_dropout": 0.25})
    model = models.make_trainable(models.load_model(gemma, placement), dropping, parent=tmp_path)
    shares = {
        module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and "lora" in name
    }
    assert shares == {0.25}
    assert any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("dora", [False, True])
def test_four_bit_weights_that_were_evaluated_are_trained_as_before(gemma: Path, recipe: Recipe, dora: bool) -> None:
    """On some CPUs, bitsandbytes rearranges them for evaluation, and they pass no gradients on from then on."""
    chosen = recipe.model_copy(update={"quantization": "nf4", "use_dora": dora})
    ids = torch.tensor([[2, 20, 21, 22, 23]])

    def gradients(*, evaluated: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = models.add_lora(models.load_model(gemma, models.place(chosen)), chosen, base_model="m")
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids=ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [weight.grad for weight in model.parameters() if weight.grad is not None]

    plain, after = gradients(evaluated=False), gradients(evaluated=True)
    assert len(plain) == len(after) > 0
    assert all(torch.allclose(one, other) for one, other in zip(plain, after, strict=True))


def test_a_pickled_adapter_is_refused_and_not_read(gemma: Path, recipe: Recipe, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "trap"), "w")

    base = models.load_model(gemma, models.place(recipe))
    models.add_lora(base, recipe, base_model="m").save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(Trap(), tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(
        models.ModelError, match=r"holds no adapter_model\.safetensors.*adapter_model\.bin\) are not read"
    ):
        models.load_adapter(models.load_model(gemma, models.place(recipe)), tmp_path / "adapter")
    assert not (tmp_path / "trap").exists()


def test_nothing_in_the_code_trusts_remote_code() -> None:
    sources = [path for root in ("tasks", "flows", "storage") for path in Path(root).rglob("*.py")]
    lines = [line for path in sources for line in path.read_text().splitlines() if "trust_remote_code" in line]
    assert lines
    assert all("trust_remote_code=False" in line for line in lines)


def test_with_method_full_auto_is_unquantized_on_any_machine(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    assert models.place(recipe).four_bit
    assert not models.place(recipe.model_copy(update={"method": "full", "full_parts": ("language",)})).four_bit


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
