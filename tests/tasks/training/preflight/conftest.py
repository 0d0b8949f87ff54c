"""A sound set-up of the tiny Gemma 4 on the squares, which tests then spoil in one place."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import ProcessorMixin

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.conversations import make_collator
from tasks.training.dataset import read_examples, write_examples
from tasks.training.preflight.child import checkpointing
from tasks.training.preflight.setup import Setup
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids

Make = Callable[..., Setup]


@pytest.fixture(scope="session")
def rows(squares: tuple[Warehouse, SnapshotRef], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("preflight") / "examples.arrow"
    write_examples(squares[1], recipe, split="train", warehouse=squares[0], path=path)
    return read_examples(path)


@pytest.fixture(scope="session")
def shared_setup(gemma: Path, recipe: Recipe, rows: Any) -> Setup:
    """The squares as a training with the recipe sees them; nobody may change it."""
    placement = models.place(recipe)
    processor = models.load_processor(gemma, recipe)
    base = models.load_model(gemma, placement)
    model = models.add_lora(base, recipe, base_model=recipe.base_model)
    collator = make_collator(processor, rows, stop_ids(base))
    return Setup(recipe, placement, processor, model, collator, rows, partial(checkpointing, model, 1.0))


@pytest.fixture
def own_processor(gemma: Path, recipe: Recipe) -> ProcessorMixin:
    """A processor to spoil."""
    return models.load_processor(gemma, recipe)


@pytest.fixture
def with_processor(shared_setup: Setup) -> Callable[[ProcessorMixin], Setup]:
    """The sound set-up, but for another processor."""

    def make(processor: ProcessorMixin) -> Setup:
        collator = make_collator(processor, shared_setup.examples, shared_setup.collator.stop_ids)
        return replace(shared_setup, processor=processor, collator=collator)

    return make


@pytest.fixture
def own_setup(gemma: Path, shared_setup: Setup) -> Make:
    """Makes set-ups to spoil: the recipe with other values, a model of its own, LoRA put on it by `adapt` if given."""

    def make(adapt: Callable[[Any], Any] | None = None, base: Any = None, **changes: Any) -> Setup:
        recipe = shared_setup.recipe.model_copy(update=changes)
        placement = models.place(recipe)
        base = base if base is not None else models.load_model(gemma, placement)
        model = adapt(base) if adapt else models.add_lora(base, recipe, base_model=recipe.base_model)
        return replace(
            shared_setup,
            recipe=recipe,
            placement=placement,
            model=model,
            checkpointing=partial(checkpointing, model, 1.0),
        )

    return make
