from pathlib import Path

import pytest
from pydantic import ValidationError

from storage.fingerprint import fingerprint
from tasks.training.recipe import Recipe, RecipeError, load_recipe

SHIPPED = sorted(Path("deployments/recipes").glob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_defaults_are_the_qlora_recipe() -> None:
    recipe = Recipe(base_model="model")
    assert (recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout) == (64, 64, 0.05)
    assert recipe.learning_rate == 5e-5
    assert recipe.batch_size == recipe.accumulation == 4
    assert recipe.gradient_checkpointing


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
        ("base_model: [\n", "not YAML"),
    ],
)
def test_faults_are_named_with_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "mine.yaml" in str(caught.value)
    assert message in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml: no such recipe"):
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
    ],
)
def test_what_several_gpus_can_not_share_is_refused_with_a_remedy(fields: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Recipe(base_model="m", **fields)
    assert message in str(caught.value)


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_any_number_of_gpus_that_divides_the_passes_will_do(gpus: int) -> None:
    assert Recipe(base_model="m", gpus=gpus, sharding="none" if gpus == 1 else "fsdp").accumulation == 4
