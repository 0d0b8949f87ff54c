"""A small published snapshot, and one run trained on it, for the tests of training, evaluation and merging."""

import os
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from storage.refs import RunRef, SnapshotRef
from storage.warehouse import Warehouse
from tasks.training.recipe import Recipe
from tests.tasks.squares import publish


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Child processes must not fight over two cores."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny Gemma 4 that ships with the sample."""
    shipped = Path(str(files("tasks.sample_models"))) / "gemma"
    return Path(shutil.copytree(shipped, tmp_path_factory.mktemp("base") / "gemma"))


@pytest.fixture(scope="session")
def recipe(gemma: Path) -> Recipe:
    """Eight short steps with dropout and accumulation, saved every second step."""
    return Recipe(
        base_model=str(gemma),
        prompt="'What colour is it?'",
        completion="metadata ->> 'answer'",
        lora_rank=4,
        lora_alpha=8,
        learning_rate=1e-3,
        allow_high_learning_rate=True,
        batch_size=2,
        accumulation=2,
        max_steps=8,
        save_steps=2,
        max_new_tokens=4,
        answer_batch_size=3,
    )


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Warehouse, SnapshotRef]:
    """A warehouse with one snapshot of 24 plain squares: 14 to train on (one without an answer), 5 and 5 held out."""
    return publish(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="session")
def trained(squares: tuple[Warehouse, SnapshotRef], recipe: Recipe) -> tuple[RunRef, list[str]]:
    """An undisturbed run on the snapshot, and its log."""
    from tasks.training.fit import train

    warehouse, snapshot = squares
    log: list[str] = []
    return train(snapshot, recipe, warehouse=warehouse, on_log=log.append).ref, log
