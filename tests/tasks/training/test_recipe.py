from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from storage.fingerprint import fingerprint
from tasks.training.recipe import Recipe, RecipeError, load_recipe

FULL = "base_model: m\nmethod: full\nfull_parts: [language]\n"
SHIPPED = sorted(Path("deployments/recipes").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_the_qlora_recipe() -> None:
    recipe = Recipe(base_model="model")
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout) == (64, 64, 0)
    assert recipe.learning_rate == 5e-5
    assert recipe.batch_size == recipe.accumulation == 4
    assert recipe.checkpointed_share is None  # as little as memory allows


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path).base_model


def test_overrides_take_the_place_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "base_model: model\nlora_rank: 8\nseed: 3\n")
    recipe = load_recipe(path, {"lora_rank": 16})
    assert (recipe.lora_rank, recipe.seed) == (16, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: m\nlora_rnk: 8\n", "lora_rnk: no such field. Did you mean 'lora_rank'"),
        ("base_model: m\nlora_dropout: 1.5\n", "lora_dropout: Input should be less than 1"),
        ("lora_rank: 8\n", "base_model: Field required"),
        ("base_model: m\nquantization: int3\n", "quantization: Input should be 'auto', 'nf4' or 'none'"),
        ("- base_model\n", "holds list, not fields"),
        ("base_model: m\ntrust_remote_code: true\n", "trust_remote_code: no such field"),
        ("base_model: m\nlora_parts: [audio]\n", "lora_parts.0: Input should be 'language', 'projector' or 'vision'"),
        ("base_model: m\nlora_parts: []\n", "lora_parts: is empty, so nothing gets LoRA"),
        ("base_model: m\nfull_parts: [language]\n", "full_parts: language can't be trained in full beside LoRA"),
        ("base_model: m\nlora_parts: [vision]\nfull_parts: [vision]\n", "full_parts: vision has LoRA already"),
        ("base_model: m\nlearning_rates: {vision: 1e-5}\n", "learning_rates: vision is not trained"),
        ("base_model: m\nmethod: full\n", "full_parts: is empty, so method: full trains nothing"),
        (FULL + "quantization: nf4\n", "quantization: 4-bit weights can't be trained"),
        (FULL + "use_dora: true\n", "use_dora: has no effect with method: full"),
        (FULL + "rank_pattern: {q_proj: 8}\n", "rank_pattern: has no effect with method: full"),
        ("base_model: m\nrank_pattern: {q_proj: 0}\n", "rank_pattern.q_proj: Input should be greater than"),
        ("base_model: m\nlora_targets: (q\n", "lora_targets: '(q' is not a regular expression"),
        ("base_model: m\nrank_pattern: {'[q': 8}\n", "rank_pattern: '[q' is not a regular expression"),
        (
            "base_model: m\nfull_parts: [projector]\ncache_vision_features: true\n",
            "cache_vision_features: projector is trained",
        ),
        ("base_model: m\ngpus: 2\ncache_vision_features: true\n", "cache_vision_features: 2 gpus compute images anew"),
        ("base_model: m\nearly_stop_patience: 0\n", "early_stop_patience: Input should be greater than"),
        ("base_model: [\n", "not YAML"),
    ],
)
def test_faults_are_named_with_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "mine.yaml" in str(caught.value)
    assert message in str(caught.value)


def test_a_high_learning_rate_on_a_4_bit_base_must_be_meant() -> None:
    Recipe(base_model="m", quantization="nf4", learning_rate=5e-5)
    with pytest.raises(
        ValidationError, match="learning_rate: language 6e-05 is above 5e-05, which often makes a 4-bit"
    ):
        Recipe(base_model="m", quantization="nf4", learning_rate=6e-5)
    Recipe(base_model="m", quantization="nf4", learning_rate=6e-5, allow_high_learning_rate=True)
    Recipe(base_model="m", quantization="none", learning_rate=6e-5)


def test_the_rate_of_any_trained_part_counts() -> None:
    rates = {"quantization": "nf4", "learning_rates": {"projector": 1e-3}}
    with pytest.raises(ValidationError, match=r"learning_rate: projector 0\.001 is above"):
        Recipe(base_model="m", full_parts=("projector",), **rates)
    lowered = {"quantization": "nf4", "learning_rate": 1e-3, "learning_rates": {"language": 1e-5}}
    assert Recipe(base_model="m", **lowered).learning_rate_of("language") == 1e-5


def test_where_the_machine_decides_on_4_bits_the_rule_waits_for_it() -> None:
    recipe = Recipe(base_model="m", quantization="auto", learning_rate=1e-3)
    recipe.check_learning_rates(four_bit=False)
    with pytest.raises(RecipeError, match="allow_high_learning_rate: true"):
        recipe.check_learning_rates(four_bit=True)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_keep_to_the_rule_on_a_gpu(path: Path) -> None:
    recipe = load_recipe(path)
    recipe.check_learning_rates(four_bit=recipe.method == "lora" and recipe.quantization != "none")


def test_noise_and_early_stopping_are_off_by_default() -> None:
    recipe = Recipe(base_model="m")
    assert (recipe.neftune_alpha, recipe.early_stop_patience) == (None, None)
    assert (recipe.method, recipe.lora_parts, recipe.full_parts) == ("lora", ("language",), ())


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml: there is no such recipe file"):
        load_recipe(tmp_path / "nothing.yaml")


def test_a_recipe_can_not_be_changed() -> None:
    with pytest.raises(ValidationError):
        Recipe(base_model="m").lora_rank = 3  # type: ignore[misc]


def test_a_recipe_is_the_same_after_a_trip_through_json() -> None:
    recipe = Recipe(base_model="m")
    assert fingerprint(Recipe.model_validate_json(recipe.model_dump_json())) == fingerprint(recipe)


def test_every_field_explains_itself() -> None:
    assert [name for name, field in Recipe.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gpus": 2, "accumulation": 3}, "gpus: 2 can't share 3 forward passes a step evenly"),
        ({"gpus": 2, "accumulation": 3}, "Write accumulation: 4 and batch_size: 3, or another number of gpus"),
        ({"gpus": 3, "batch_size": 1, "accumulation": 4}, "Write accumulation: 6, or another number of gpus"),
        ({"sharding": "fsdp"}, "sharding: fsdp needs several GPUs. Write gpus: 2 or more"),
        ({"gpus": 2, "sharding": "zero3", "quantization": "nf4"}, "zero3 can't share 4-bit weights"),
        ({"gpus": 2, "sharding": "fsdp", "optimizer": "paged_adamw_8bit"}, "optimizer: paged_adamw_8bit can't keep"),
    ],
)
def test_what_several_gpus_can_not_share_is_refused_with_a_remedy(fields: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe(base_model="m", **fields)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "four_bit"),
    [
        ({}, True),
        ({"method": "full", "full_parts": ("language",)}, False),
        ({"gpus": 2, "sharding": "fsdp"}, True),
        ({"gpus": 2, "sharding": "zero3"}, False),
    ],
)
def test_a_recipe_that_does_not_say_uses_four_bits_on_a_gpu_where_that_works(
    fields: dict[str, Any], four_bit: bool
) -> None:
    recipe = Recipe(base_model="m", **fields)
    assert (recipe.is_four_bit(on_gpu=True), recipe.is_four_bit(on_gpu=False)) == (four_bit, False)


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_any_number_of_gpus_that_divides_the_passes_will_do(gpus: int) -> None:
    assert Recipe(base_model="m", gpus=gpus, sharding="none" if gpus == 1 else "fsdp").accumulation == 4
