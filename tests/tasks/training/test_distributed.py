"""Two processes against one: the same samples, losses and adapter, whole or sharded, undisturbed or killed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training.dataset import write_examples
from tasks.training.process import run_child
from tasks.training.recipe import Recipe

CHILD = "tests.tasks.training.shared_child"
CHECKED = 8  # batches that the loss mask is checked on before training


@dataclass(frozen=True)
class Trained:
    """What a training left behind."""

    folder: Path
    result: dict[str, Any]
    log: list[str]

    @property
    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    def batches(self, rank: int) -> list[str]:
        return (self.folder / f"seen-{rank}.txt").read_text().splitlines()[CHECKED:]


class Trainings:
    """Trains the same model on the same examples, once for each way of doing so."""

    def __init__(self, examples: Path, recipe: Recipe, root: Path) -> None:
        self.examples, self.recipe, self.root = examples, recipe, root
        self.done: dict[str, Trained] = {}

    def run(self, *, kill: dict[str, int] | None = None, restarts: int = 0, **fields: Any) -> Trained:
        name = "-".join(f"{name}={value}" for name, value in {**fields, "kill": bool(kill)}.items())
        if name not in self.done:
            folder = self.root / name
            folder.mkdir()
            recipe = Recipe.model_validate({**self.recipe.model_dump(), **fields})
            config = {
                "recipe": recipe.model_dump(),
                "model": recipe.base_model,
                "examples": str(self.examples),
                "parent_adapter": None,
                "kill": kill,
            }
            log: list[str] = []
            result = run_child(
                CHILD, config, folder=folder, on_log=log.append, processes=recipe.gpus, restarts=restarts
            )
            self.done[name] = Trained(folder, result, log)
        return self.done[name]


@pytest.fixture(scope="module")
def trainings(
    squares: tuple[Warehouse, SnapshotRef], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Trainings:
    warehouse, snapshot = squares
    root = tmp_path_factory.mktemp("shared")
    still = recipe.model_copy(update={"lora_dropout": 0.0, "max_steps": 6})
    written = write_examples(snapshot, still, split="train", warehouse=warehouse, path=root / "examples.arrow")
    return Trainings(written.path, still, root)


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.adapter.keys() == expected.adapter.keys()
    for name, weight in expected.adapter.items():
        torch.testing.assert_close(found.adapter[name], weight, rtol=1e-3, atol=1e-5)


def test_two_processes_train_what_one_does(trainings: Trainings) -> None:
    assert_same(trainings.run(gpus=2), trainings.run(gpus=1))


def test_each_process_sees_every_other_batch_of_one_process(trainings: Trainings) -> None:
    alone, shared = trainings.run(gpus=1).batches(0), trainings.run(gpus=2)
    assert len(alone) == 6 * 2
    assert [shared.batches(0), shared.batches(1)] == [alone[0::2], alone[1::2]]


def test_a_pass_shows_every_sample_once(trainings: Trainings) -> None:
    seen = " ".join(trainings.run(gpus=1).batches(0)).split()
    assert len(set(seen[:13])) == 13
    assert sorted(seen[:13]) == sorted(set(seen))


def test_metrics_count_the_tokens_of_all_processes(trainings: Trainings) -> None:
    one, two = trainings.run(gpus=1).result, trainings.run(gpus=2).result
    assert (two["tokens"], two["steps"]) == (one["tokens"], one["steps"])
    assert (one["processes"], two["processes"]) == (1, 2)


def test_fsdp_trains_what_one_process_does_and_leaves_an_ordinary_adapter(trainings: Trainings) -> None:
    assert_same(trainings.run(gpus=2, sharding="fsdp"), trainings.run(gpus=1))


def test_fsdp_shares_four_bit_weights(trainings: Trainings) -> None:
    assert_same(trainings.run(gpus=2, sharding="fsdp", quantization="nf4"), trainings.run(gpus=1, quantization="nf4"))


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_killed_process_is_started_again_from_the_last_checkpoint(trainings: Trainings, sharding: str) -> None:
    kill = {"rank": 1, "at_batch": CHECKED + 5}  # in the fifth step; checkpoints are of the second and fourth
    disturbed = trainings.run(gpus=2, sharding=sharding, kill=kill, restarts=1)
    assert any("rank 1 was killed by SIGKILL" in line and "0 restarts are left" in line for line in disturbed.log)
    assert "going on from checkpoint-4" in disturbed.log
    undisturbed = trainings.run(gpus=2, sharding=sharding)
    assert disturbed.losses == undisturbed.losses
    assert all(torch.equal(disturbed.adapter[name], weight) for name, weight in undisturbed.adapter.items())
