"""Parameter groups, learning rates, schedules and early stopping, each seen in what a short training does."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.conversations import make_collator
from tasks.training.dataset import read_examples
from tasks.training.documents import write_rows
from tasks.training.optimizer import early_stop, optimization_arguments, parameter_groups
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids

Squares = tuple[Warehouse, SnapshotRef]


@pytest.fixture(scope="module")
def short(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"max_steps": 4, "accumulation": 1, "lora_dropout": 0.0, "checkpointed_share": 0})


def run_of(squares: Squares, recipe: Recipe, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train in this process; return the run's result and its metrics by step."""
    warehouse, snapshot = squares
    config: dict[str, Any] = {"recipe": recipe.model_dump(), "model": recipe.base_model, "parent_adapter": None}
    for key, split in (("examples", "train"), ("validation", "validation")):
        config[key] = str(folder / f"{key}.arrow")
        write_rows(snapshot, recipe, split=split, warehouse=warehouse, path=folder / f"{key}.arrow")
    result = dict(importlib.import_module("tasks.training.child").run(config, folder))
    return result, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def leaves(value: Any) -> list[torch.Tensor]:
    """The tensors that moments may be: on their own, or among those that quantisation needs."""
    inner = value.values() if isinstance(value, dict) else [value]
    return [tensor for tensor in inner if isinstance(tensor, torch.Tensor)]


def groups_of(gemma: Path, recipe: Recipe) -> list[dict[str, Any]]:
    base = models.load_model(gemma, models.place(recipe))
    return parameter_groups(models.make_trainable(base, recipe, parent=None), recipe)


def test_every_trained_weight_is_in_one_group_with_its_parts_rate(gemma: Path, recipe: Recipe) -> None:
    parts = {"lora_parts": ("language", "vision"), "full_parts": ("projector",)}
    rates = {"learning_rate": 1e-4, "learning_rates": {"vision": 1e-5, "projector": 2e-5}}
    chosen = recipe.model_copy(update={**parts, **rates})
    model = models.make_trainable(models.load_model(gemma, models.place(chosen)), chosen, parent=None)
    groups = parameter_groups(model, chosen)
    assert {group["part"]: group["lr"] for group in groups} == {"language": 1e-4, "vision": 1e-5, "projector": 2e-5}
    rate_of = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(rate_of) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, weight in trained.items():
        expected = 1e-5 if "vision_tower" in name else 2e-5 if "embed_vision" in name else 1e-4
        assert rate_of[id(weight)] == expected, name


def test_vectors_do_not_decay(gemma: Path, recipe: Recipe) -> None:
    full = {"method": "full", "full_parts": ("language",), "weight_decay": 0.1}
    groups = groups_of(gemma, recipe.model_copy(update=full))
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    for group in groups:
        assert {weight.dim() > 1 for weight in group["params"]} == {group["weight_decay"] > 0}


def test_a_part_with_a_tiny_rate_stays_where_it_was(
    squares: Squares, short: Recipe, gemma: Path, tmp_path: Path
) -> None:
    still = {"full_parts": ("projector",), "learning_rates": {"projector": 1e-12}, "max_steps": 2}
    run_of(squares, short.model_copy(update=still), tmp_path)
    base = models.load_model(gemma, models.place(short))
    before = base.get_parameter("model.embed_vision.embedding_projection.weight").clone()
    adapted = models.load_adapter(base, tmp_path / "adapter")
    state = dict(adapted.named_parameters())
    [after] = [weight for name, weight in state.items() if "embed_vision" in name and "modules_to_save" in name]
    assert torch.allclose(before, after, atol=1e-9)
    moved = [weight.abs().max() for name, weight in state.items() if ".lora_B." in name]
    assert min(moved) > 1e-4


@pytest.mark.parametrize(
    ("scheduler", "after_warmup"),
    [
        ("cosine", [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]),
        ("linear", [1 - step / 8 for step in range(9)]),
        ("constant", [1.0] * 9),
    ],
)
def test_schedules_warm_up_and_go_on_as_they_are_called(scheduler: str, after_warmup: list[float]) -> None:
    recipe = Recipe(base_model="m", scheduler=scheduler, warmup=0.2)
    arguments = optimization_arguments(recipe, steps=10)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        arguments["lr_scheduler_type"], optimizer, num_warmup_steps=arguments["warmup_steps"], num_training_steps=10
    )
    rates = []
    for _ in range(11):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.5, *after_warmup])


@pytest.mark.parametrize(("warmup", "steps"), [(0.03, 1), (0.9, 3)])
def test_a_short_training_does_not_spend_all_its_steps_on_warming_up(warmup: float, steps: int) -> None:
    arguments = optimization_arguments(Recipe(base_model="m", warmup=warmup), steps=steps)
    assert arguments["warmup_steps"] == steps - 1


def test_paged_8_bit_adamw_holds_its_state_in_bytes_and_trains(squares: Squares, short: Recipe, tmp_path: Path) -> None:
    # bitsandbytes keeps the state of small matrices in 32 bits
    recipe = short.model_copy(update={"optimizer": "paged_adamw_8bit", "lora_rank": 32, "save_steps": 4})
    _, steps = run_of(squares, recipe, tmp_path)
    assert steps[-1]["loss"] < steps[0]["loss"]
    saved = torch.load(tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.pt")["state"].values()
    dtypes = {tensor.dtype for state in saved for inner in state.values() for tensor in leaves(inner)}
    assert torch.uint8 in dtypes


def test_what_the_recipe_says_reaches_the_trainer() -> None:
    recipe = Recipe(base_model="m", weight_decay=0.1, max_grad_norm=0.3, neftune_alpha=5, optimizer="paged_adamw_8bit")
    arguments = optimization_arguments(recipe, steps=100)
    names = ("weight_decay", "max_grad_norm", "neftune_noise_alpha", "optim", "warmup_steps")
    assert [arguments[name] for name in names] == [0.1, 0.3, 5, "paged_adamw_8bit", 3]
    assert "eval_strategy" not in arguments
    assert early_stop(recipe) == []


def test_a_loss_that_stops_falling_ends_the_training_with_the_best_weights(
    squares: Squares, short: Recipe, gemma: Path, tmp_path: Path
) -> None:
    # a rate that wrecks the model: the first evaluation is the best one
    wild = {"early_stop_patience": 2, "save_steps": 1, "max_steps": 8, "learning_rate": 0.3, "scheduler": "constant"}
    recipe = short.model_copy(update={**wild, "warmup": 0.0})
    result, _ = run_of(squares, recipe, tmp_path)
    states = [json.loads(path.read_text()) for path in tmp_path.glob("checkpoints/checkpoint-*/trainer_state.json")]
    last = max(states, key=lambda state: int(state["global_step"]))
    losses = {entry["step"]: entry["eval_loss"] for entry in last["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.__getitem__)
    assert result["steps"] == max(losses) == best + 2 < 8
    assert result["validation_loss"] == losses[best]
    best_weights = load_file(tmp_path / f"checkpoints/checkpoint-{best}" / "adapter_model.safetensors")
    kept = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert best_weights.keys() == kept.keys()
    assert all(torch.equal(best_weights[name], kept[name]) for name in kept)
    assert result["validation_loss"] == pytest.approx(loss_by_token(gemma, recipe, tmp_path), rel=1e-5)


def test_a_training_that_ended_early_does_not_go_on_when_what_comes_after_it_was_cut(
    squares: Squares, short: Recipe, tmp_path: Path
) -> None:
    wild = {"early_stop_patience": 1, "save_steps": 1, "max_steps": 8, "learning_rate": 0.3, "scheduler": "constant"}
    recipe = short.model_copy(update={**wild, "warmup": 0.0})
    result, steps = run_of(squares, recipe, tmp_path)
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    again, repeated = run_of(squares, recipe, tmp_path)
    assert len(steps) < 8
    assert repeated == steps
    assert again["validation_loss"] == result["validation_loss"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def loss_by_token(gemma: Path, recipe: Recipe, folder: Path) -> float:
    """The mean loss over the supervised tokens of all held-out rows, one row at a time."""
    base = models.load_model(gemma, models.place(recipe))
    model = models.load_adapter(base, folder / "adapter").eval()
    rows = read_examples(folder / "validation.arrow")
    collator = make_collator(models.load_processor(gemma, recipe), rows, stop_ids(base))
    losses = []
    for row in rows:
        inputs = collator([row])
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")[labels >= 0])
    return torch.cat(losses).mean().item()
