"""Weights trained in full: which get gradients, and that what is kept can be evaluated and merged."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.adapters import child as merging
from tasks.training import fit
from tasks.training import model as models
from tasks.training.families import parts_of
from tasks.training.fit import train
from tasks.training.full import PARTS, is_saved_in_full
from tasks.training.recipe import Recipe, RecipeError

PROJECTOR = "model.embed_vision.embedding_projection.weight"


@pytest.fixture(scope="module")
def projector_only(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"method": "full", "full_parts": ("projector",), "max_steps": 2, "accumulation": 1})


def load(gemma: Path, recipe: Recipe) -> Any:
    return models.load_model(gemma, models.place(recipe))


def test_only_the_chosen_parts_get_gradients(gemma: Path, projector_only: Recipe) -> None:
    for chosen in (("projector",), ("vision",), ("projector", "vision")):
        recipe = projector_only.model_copy(update={"full_parts": chosen})
        model = models.make_trainable(load(gemma, recipe), recipe, parent=None)
        parts = parts_of(model)
        assert {parts.of(name) for name, weight in model.named_parameters() if weight.requires_grad} == set(chosen)
        assert {parts.of(name) for name, weight in model.named_parameters() if not weight.requires_grad}.isdisjoint(
            chosen
        )


def test_the_output_head_belongs_to_the_language_model(gemma: Path, projector_only: Recipe) -> None:
    recipe = projector_only.model_copy(update={"full_parts": ("language",)})
    model = models.make_trainable(load(gemma, recipe), recipe, parent=None)
    assert model.get_output_embeddings().weight.requires_grad
    assert not model.get_parameter(PROJECTOR).requires_grad


def test_what_was_trained_comes_back_on_the_base_model(gemma: Path, projector_only: Recipe, tmp_path: Path) -> None:
    model = models.make_trainable(load(gemma, projector_only), projector_only, parent=None)
    with torch.no_grad():
        model.get_parameter(PROJECTOR).add_(1.0)
    models.save_trained(model, tmp_path, projector_only, dtype=torch.float32)
    [file] = tmp_path.glob("*.safetensors")
    assert set(load_file(file)) == {PROJECTOR}
    again = models.load_adapter(load(gemma, projector_only), tmp_path)
    for name, weight in model.named_parameters():
        assert torch.equal(again.get_parameter(name), weight), name


def test_weights_kept_in_bf16_take_half_the_space(gemma: Path, projector_only: Recipe, tmp_path: Path) -> None:
    model = models.make_trainable(load(gemma, projector_only), projector_only, parent=None)
    models.save_trained(model, tmp_path, projector_only, dtype=torch.bfloat16)
    [file] = tmp_path.glob("*.safetensors")
    assert load_file(file)[PROJECTOR].dtype == torch.bfloat16


def test_weights_of_a_4_bit_base_can_not_be_replaced(gemma: Path, projector_only: Recipe, tmp_path: Path) -> None:
    language = projector_only.model_copy(update={"full_parts": ("language",)})
    model = models.make_trainable(load(gemma, language), language, parent=None)
    models.save_trained(model, tmp_path, language, dtype=torch.float32)
    in_four_bits = load(gemma, Recipe(base_model=str(gemma), quantization="nf4"))
    with pytest.raises(models.ModelError, match=r"of language were trained in full.*Set quantization: none"):
        models.load_adapter(in_four_bits, tmp_path)


@pytest.mark.parametrize("fault", ["other", "lacking"])
def test_weights_that_do_not_fit_are_refused(gemma: Path, projector_only: Recipe, tmp_path: Path, fault: str) -> None:
    model = models.make_trainable(load(gemma, projector_only), projector_only, parent=None)
    models.save_trained(model, tmp_path, projector_only, dtype=torch.float32)
    [file] = tmp_path.glob("*.safetensors")
    save_file({"model.own.weight": torch.zeros(2)} if fault == "other" else {}, file)
    message = "has no place in Gemma4For" if fault == "other" else f"lacks {PROJECTOR}"
    with pytest.raises(models.ModelError, match=message):
        models.load_adapter(load(gemma, projector_only), tmp_path)


def run_here(module: str, config: dict[str, Any], *, folder: Path, **_: Any) -> dict[str, Any]:
    return dict(importlib.import_module(module).run(config, folder))


def test_a_run_in_full_is_trained_kept_continued_and_merged(
    squares: tuple[Warehouse, SnapshotRef],
    gemma: Path,
    projector_only: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(fit, "run_child", run_here)  # a process of its own would only cost time
    warehouse, snapshot = squares
    run = train(snapshot, projector_only, warehouse=warehouse).ref
    adapter = Path(warehouse.local_path(run.adapter))
    assert is_saved_in_full(adapter)
    assert {path.name for path in adapter.iterdir()} == {PARTS, "trained.safetensors"}

    trained = load_file(adapter / "trained.safetensors")[PROJECTOR]
    base = load(gemma, projector_only)
    assert not torch.equal(base.get_parameter(PROJECTOR), trained)
    merged = merging.merge(base, adapter)
    merged.save_pretrained(tmp_path / "merged")
    reloaded = load(tmp_path / "merged", projector_only)
    assert torch.equal(reloaded.get_parameter(PROJECTOR), trained)

    still = projector_only.model_copy(update={"learning_rate": 1e-12, "max_steps": 1})
    child = train(snapshot, still, warehouse=warehouse, parent_run=run).ref
    again = load_file(Path(warehouse.local_path(child.adapter)) / "trained.safetensors")[PROJECTOR]
    assert torch.allclose(again, trained, atol=1e-9)
    with pytest.raises(RecipeError, match=r"zero3 can't start from weights that the parent run .*Write sharding: fsdp"):
        shared = still.model_copy(update={"max_steps": 3, "gpus": 2, "sharding": "zero3"})
        train(snapshot, shared, warehouse=warehouse, parent_run=run)
    with pytest.raises(RecipeError, match=r"method: is 'lora', but .* has 'full'.*take the merged model as base_model"):
        lora = still.model_copy(update={"method": "lora", "full_parts": ()})
        train(snapshot, lora, warehouse=warehouse, parent_run=run)


def test_a_part_in_full_beside_lora_is_kept_with_the_adapter_and_merged(
    squares: tuple[Warehouse, SnapshotRef],
    gemma: Path,
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fit, "run_child", run_here)
    warehouse, snapshot = squares
    both = recipe.model_copy(update={"full_parts": ("projector",), "max_steps": 2, "accumulation": 1})
    run = train(snapshot, both, warehouse=warehouse).ref
    adapter = Path(warehouse.local_path(run.adapter))
    [name] = [name for name in load_file(adapter / "adapter_model.safetensors") if "embed_vision" in name]
    trained = load_file(adapter / "adapter_model.safetensors")[name]
    base = load(gemma, both)
    assert not torch.equal(base.get_parameter(PROJECTOR), trained)
    assert torch.equal(merging.merge(base, adapter).get_parameter(PROJECTOR), trained)
