"""Every family as a tiny random model: parts, LoRA, 4-bit weights, a training step; and the real models' shapes."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForMultimodalLM, PreTrainedModel, ProcessorMixin
from transformers.models.gemma4.modeling_gemma4 import Gemma4ClippableLinear

from tasks.training import families
from tasks.training import model as models
from tasks.training.collate import CompletionCollator
from tasks.training.dataset import FEATURES
from tasks.training.experts import bytes_in_nf4, check_fits_in_nf4
from tasks.training.families import FAMILIES, find_family, parts_of
from tasks.training.features import with_features
from tasks.training.recipe import Recipe, RecipeError
from tasks.training.template import stop_ids
from tests.tasks.training import tiny_models
from tests.tasks.training.tiny_models import MODELS, config_of, write

NOT_CACHED = ("qwen3_vl",)  # its language model takes features from inside the vision tower too
ROOTS = {  # where the makers of each model put its vision tower and projector, read off their source
    "gemma4": ("vision_tower", "embed_vision"),
    "gemma4_unified": (None, "embed_vision"),
    "gemma3": ("vision_tower", "multi_modal_projector"),
    "llava": ("vision_tower", "multi_modal_projector"),
    "qwen2_5_vl": ("visual", "visual.merger"),
    "qwen3_vl": ("visual", "visual.merger"),
    "smolvlm": ("vision_model", "connector"),
    "idefics3": ("vision_model", "connector"),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(request.param, tmp_path_factory.mktemp("model"))


def recipe_for(folder: Path, **fields: Any) -> Recipe:
    return Recipe(base_model=str(folder), lora_rank=2, lora_alpha=4, lora_dropout=0, **fields)


def load(folder: Path, **fields: Any) -> PreTrainedModel:
    return models.load_model(folder, models.place(recipe_for(folder, **fields)))


def text_row(question: str, answer: str) -> dict[str, Any]:
    prompt, completion = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"prompt": [prompt], "completion": [completion]}


def batch_of(processor: ProcessorMixin, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two rows with one and two images, all of different sizes."""

    def row(question: str, answer: str, *sizes: tuple[int, int]) -> dict[str, Any]:
        return {**text_row(question, answer), "images": [Image.new("RGB", size, "red") for size in sizes]}

    collate = CompletionCollator(processor, completion_only_loss=True, stop_ids=stop_ids(model))
    return collate([row("What?", "A cat.", (40, 60)), row("And in both of these?", "Two dogs.", (90, 30), (64, 64))])


def available(model: PreTrainedModel) -> list[str]:
    """Parts of the model that LoRA can sit on."""
    vision, projector = ROOTS[model.config.model_type]
    has_linears = any(projector in name for name in models.linear_names(model))
    return ["language", *(["projector"] if has_linears else []), *(["vision"] if vision else [])]


def test_every_weight_belongs_to_a_part(folder: Path) -> None:
    model = load(folder)
    vision, projector = ROOTS[model.config.model_type]
    parts = parts_of(model)
    for name, _ in model.named_parameters():
        inside = name.removeprefix("model.")
        if inside.startswith(projector) or "deepstack" in name:
            expected = "projector"
        elif vision and inside.startswith(vision):
            expected = "vision"
        elif "audio" in name:
            expected = "audio"
        else:
            expected = "head" if name.startswith("lm_head") else "language"
        assert parts.of(name) == expected, name


def test_lora_lands_in_the_chosen_part_only(folder: Path) -> None:
    base = load(folder)
    plain = parts_of(base)
    for part in available(base):
        recipe = recipe_for(folder, lora_parts=(part,))
        adapted = models.make_trainable(base, recipe, parent=None)
        names = models.lora_names(adapted)
        assert names
        assert {plain.of(name) for name in names} == {part}
        trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
        assert all(".lora_A." in name or ".lora_B." in name for name in trained)
        base = adapted.unload()


def test_a_training_step_gives_gradients_in_the_trained_parts_only(folder: Path) -> None:
    model = load(folder)
    processor = models.load_processor(folder, recipe_for(folder))
    lora = tuple(part for part in available(model) if part != "projector")
    adapted = models.make_trainable(model, recipe_for(folder, lora_parts=lora, full_parts=("projector",)), parent=None)
    loss = adapted(**batch_of(processor, model)).loss
    loss.backward()
    assert torch.isfinite(loss)
    parts = parts_of(adapted)
    moved = {name for name, weight in adapted.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {parts.of(name) for name in moved} == {*lora, "projector"}
    assert all("modules_to_save" in name if parts.of(name) == "projector" else ".lora_B." in name for name in moved)


def test_nf4_holds_the_language_model_and_nothing_else_and_runs(folder: Path) -> None:
    model = load(folder, quantization="nf4")
    in_four_bits = {name for name, module in models.linear_names(model).items() if models.is_four_bit(module)}
    language = ("model.language_model.", "model.text_model.")
    assert in_four_bits == {name for name in models.linear_names(model) if name.startswith(language)}
    assert in_four_bits
    assert model.get_output_embeddings().weight.is_floating_point()
    processor = models.load_processor(folder, recipe_for(folder))
    with torch.no_grad():
        assert torch.isfinite(model(**batch_of(processor, model)).loss)


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("gemma4 edge", tmp_path_factory.mktemp("model"))


def test_clipping_stays_around_lora_in_gemma_4s_vision_tower(edge: Path) -> None:
    adapted = models.make_trainable(load(edge), recipe_for(edge, lora_parts=("vision",)), parent=None)
    name = "model.vision_tower.encoder.layers.0.mlp.up_proj"
    clipped = adapted.get_base_model().get_submodule(name)
    assert f"{name}.linear" in models.lora_names(adapted)
    assert isinstance(clipped, Gemma4ClippableLinear)
    with torch.no_grad():
        clipped.linear.lora_B["default"].weight.fill_(100.0)
        clipped.output_min.fill_(-0.5)
        clipped.output_max.fill_(0.5)
        unclipped = clipped.linear(torch.ones(1, 64))
        assert unclipped.abs().max() > 0.5
        assert clipped(torch.ones(1, 64)).abs().max() <= 0.5


def test_a_part_without_linears_says_how_to_train_it(tmp_path: Path) -> None:
    write("gemma3", tmp_path)
    with pytest.raises(RecipeError, match=r"the projector of Gemma3For.* has no linear layer.*into full_parts instead"):
        models.lora_layers(load(tmp_path), recipe_for(tmp_path, lora_parts=("projector",)))


def test_a_part_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    write("gemma4 unified", tmp_path)
    for fields in ({"lora_parts": ("vision",)}, {"full_parts": ("vision",)}):
        with pytest.raises(RecipeError, match=r"Gemma4UnifiedFor.* has no vision of its own"):
            models.make_trainable(load(tmp_path), recipe_for(tmp_path, **fields), parent=None)


def test_a_model_of_no_family_is_trained_in_its_language_model_only() -> None:
    vision = {**tiny_models.VISION, "image_size": 32, "patch_size": 8, "model_type": "siglip_vision_model"}
    text = {**tiny_models.TEXT, "model_type": "qwen2", "vocab_size": 64}
    config = config_of("llava_onevision", text_config=text, vision_config=vision, image_token_index=3)
    model = AutoModelForMultimodalLM.from_config(config)
    assert find_family("llava_onevision") is None
    layers = models.lora_layers(model, Recipe(base_model="m"))
    assert len(layers) == 14
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    for fields in ({"lora_parts": ("vision",)}, {"full_parts": ("projector",)}):
        with pytest.raises(RecipeError, match=r"is not known. Train the language model only, or .*Gemma 4.*SmolVLM"):
            models.make_trainable(model, Recipe(base_model="m", **fields), parent=None)


def test_a_family_that_moved_its_language_model_is_noticed(edge: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = replace(FAMILIES[0], language="model.decoder")
    monkeypatch.setattr(families, "FAMILIES", (moved,))
    with pytest.raises(
        models.ModelError, match=r"keeps its language model in model\.language_model, but Gemma 4 models"
    ):
        parts_of(load(edge))


GEMMA_31B: dict[str, Any] = {
    **{"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60, "num_attention_heads": 32},
    **{"num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 4},
    **{"attention_k_eq_v": True, "use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0},
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 10,
}
GEMMA_26B: dict[str, Any] = {
    **{"hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "num_attention_heads": 16},
    **{"num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 2},
    **{"attention_k_eq_v": True, "use_bidirectional_attention": "vision", "hidden_size_per_layer_input": 0},
    **{"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
}
LARGE_VISION: dict[str, Any] = {
    **{"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16},
    **{"num_key_value_heads": 16, "head_dim": 72},
}


GEMMA_E4B: dict[str, Any] = {
    **{"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_attention_heads": 8},
    **{"num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 18},
    **{"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144},
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 7,
}
GEMMA_E2B: dict[str, Any] = {
    **{"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_attention_heads": 8},
    **{"num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 20},
    **{"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "use_double_wide_mlp": True},
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}
EDGE_VISION: dict[str, Any] = {
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12},
    **{"num_key_value_heads": 12, "head_dim": 64, "use_clipped_linears": True},
}


@cache
def skeleton(name: str) -> PreTrainedModel:
    text = {"31B": GEMMA_31B, "26B-A4B": GEMMA_26B, "E4B": GEMMA_E4B, "E2B": GEMMA_E2B}[name]
    vision, audio = (EDGE_VISION, {}) if name in ("E4B", "E2B") else (LARGE_VISION, None)
    config = config_of("gemma4", text_config=text, vision_config=vision, audio_config=audio)
    with torch.device("meta"):
        return AutoModelForMultimodalLM.from_config(config)


@pytest.mark.parametrize(
    ("name", "billions", "gib"),
    [("31B", 29.29, 17.77), ("26B-A4B", 1.66, 45.8), ("E4B", 3.97, 9.30), ("E2B", 1.88, 6.91)],
)
def test_real_shapes_have_the_sizes_that_are_published(name: str, billions: float, gib: float) -> None:
    model = skeleton(name)
    parts = parts_of(model)
    weights = sum(m.weight.numel() for at, m in models.linear_names(model).items() if parts.of(at) == "language")
    assert weights / 1e9 == pytest.approx(billions, abs=0.006)
    assert bytes_in_nf4(model, torch.bfloat16) / 2**30 == pytest.approx(gib, rel=0.003)


def test_lora_on_e2b_skips_the_keys_that_layers_share_and_all_of_vision_and_audio() -> None:
    layers = models.lora_layers(skeleton("E2B"), Recipe(base_model="m"))
    assert len(layers) == 35 * 7 - 20 * 2
    assert all(name.startswith("model.language_model.layers.") for name in layers)


def test_lora_on_the_31b_covers_its_410_layers() -> None:
    model = skeleton("31B")
    layers = models.lora_layers(model, Recipe(base_model="m"))
    assert len(layers) == 410  # full layers have no v_proj
    linears = models.linear_names(model)
    weights = sum(16 * (linears[name].in_features + linears[name].out_features) for name in layers)
    assert round(weights / 1e6, 1) == 122.4


def test_experts_that_stay_in_bf16_are_refused_on_a_small_card() -> None:
    model = skeleton("26B-A4B")
    with pytest.raises(models.ModelError) as caught:
        check_fits_in_nf4(model, 24 * 2**30, dtype=torch.bfloat16)
    assert "takes 45.8 GiB even in NF4, and the GPU has 24.0 GiB" in str(caught.value)
    assert "no linear layers and stay in bfloat16. Use a larger GPU, or a model without experts" in str(caught.value)
    check_fits_in_nf4(model, 80 * 2**30, dtype=torch.bfloat16)


def test_a_dense_model_larger_than_the_gpu_is_refused_with_what_to_do() -> None:
    model = skeleton("31B")
    check_fits_in_nf4(model, 24 * 2**30, dtype=torch.bfloat16)
    with pytest.raises(models.ModelError) as caught:
        check_fits_in_nf4(model, 16 * 2**30, dtype=torch.bfloat16)
    assert "takes 17.8 GiB even in NF4, and the GPU has 16.0 GiB. Several GPUs don't help" in str(caught.value)
    assert "quantization: none with sharding: fsdp" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "bound", "within"),
    [("gemma4 edge", 70, 70), ("qwen2.5-vl", 9, 9), ("qwen3-vl", 9, 9), ("smolvlm", 20, 20), ("smolvlm", 4, 4)],
)
def test_an_image_becomes_no_more_tokens_than_the_recipe_allows(
    tmp_path: Path, name: str, bound: int, within: int
) -> None:
    write(name, tmp_path)
    processor: Any = models.load_processor(tmp_path, recipe_for(tmp_path, max_image_tokens=bound))
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (300, 200))}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert 1 <= int((inputs["input_ids"] == processor.image_token_id).sum()) <= within


@pytest.mark.parametrize(
    ("name", "bound", "message"),
    [
        ("gemma4 edge", 100, "max_image_tokens: is 100. Write one of 70, 140, 280, 560, 1120"),
        ("smolvlm", 3, "one tile alone is 4 tokens"),
        ("llava clip llama", 9, "CLIPImageProcessor makes the same number of every image"),
    ],
)
def test_bounds_that_can_not_be_kept_are_refused(tmp_path: Path, name: str, bound: int, message: str) -> None:
    write(name, tmp_path)
    with pytest.raises(RecipeError, match=message):
        models.load_processor(tmp_path, recipe_for(tmp_path, max_image_tokens=bound))


def test_cached_image_features_give_the_loss_of_the_images(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_for(folder, cache_vision_features=True)
    model, processor = load(folder).requires_grad_(False), models.load_processor(folder, recipe)
    images = [[Image.new("RGB", size, "red")] for size in ((40, 60), (90, 30))]
    rows = Dataset.from_list(
        [
            {**text_row(f"What is it, {at}?", "A cat."), "sample_id": str(at), "images": them}
            for at, them in enumerate(images)
        ],
        features=FEATURES,
    )
    collate = CompletionCollator(processor, completion_only_loss=True, stop_ids=stop_ids(model))
    batch = collate([rows[0], rows[1]])
    expected = model(**batch).loss.item()
    cached = with_features(collate, model, rows, recipe, epochs=9, folder=tmp_path)([rows[0], rows[1]])
    assert ("pixel_values" in cached) == (model.config.model_type in NOT_CACHED)
    assert model(**cached).loss.item() == pytest.approx(expected, rel=1e-6)
