"""Cached image features stand in for images: same outputs, same losses, nothing computed twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.conversations import make_collator
from tasks.training.dataset import read_examples, write_examples
from tasks.training.features import FEATURES, FeatureCollator, FeatureInput, NotCacheable, cache_features
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> Any:
    return models.load_model(recipe.base_model, models.place(recipe))


@pytest.fixture(scope="module")
def rows(squares: tuple[Warehouse, SnapshotRef], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    warehouse, snapshot = squares
    path = tmp_path_factory.mktemp("rows") / "examples.arrow"
    write_examples(snapshot, recipe, split="train", warehouse=warehouse, path=path)
    return read_examples(path)


@pytest.fixture(scope="module")
def collator(model: Any, rows: Dataset, recipe: Recipe) -> Any:
    return make_collator(models.load_processor(recipe.base_model, recipe), rows, stop_ids(model))


@pytest.fixture(scope="module")
def cached(model: Any, rows: Dataset, collator: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureCollator:
    folder = tmp_path_factory.mktemp("features")
    return FeatureCollator(collator, cache_features(model, rows, collator, folder=folder, batch_size=3, workers=0))


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return output


def test_a_model_says_the_same_with_features_as_with_images(
    model: Any, rows: Dataset, collator: Any, cached: FeatureCollator
) -> None:
    chosen = [rows[at] for at in (5, 0, 9)]
    wanted = logits(model, collator(chosen))
    source = FeatureInput(model)
    try:
        torch.testing.assert_close(logits(model, cached(chosen)), wanted)
    finally:
        source.remove()


def test_batches_carry_features_in_place_of_pixels(rows: Dataset, cached: FeatureCollator) -> None:
    batch = cached([rows[0], rows[1]])
    assert "pixel_values" not in batch
    assert batch[FEATURES].shape[0] == (batch["input_ids"] == 5).sum()


def test_a_sample_that_is_not_cached_keeps_its_image(rows: Dataset, cached: FeatureCollator) -> None:
    batch = cached([rows[0], {**rows[1], "sample_id": "unknown"}])
    assert "pixel_values" in batch


def test_features_that_exist_are_not_computed_again(
    model: Any, rows: Dataset, collator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache_features(model, rows, collator, folder=tmp_path, batch_size=4, workers=0)
    monkeypatch.setattr(model.base_model, "get_image_features", None)
    second = cache_features(model, rows, collator, folder=tmp_path, batch_size=4, workers=0)
    assert (second.data == first.data).all()


def test_a_model_that_reads_its_pixels_elsewhere_is_not_cached(
    model: Any, rows: Dataset, collator: Any, tmp_path: Path
) -> None:
    def look(module: Any, args: Any, kwargs: Batch) -> tuple[Any, Batch]:
        seen = kwargs.get("pixel_values")
        return args, kwargs if seen is None else kwargs | {"attention_mask": torch.tril(kwargs["attention_mask"], -1)}

    hook = model.base_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with pytest.raises(NotCacheable, match="computes something else"):
            cache_features(model, rows, collator, folder=tmp_path, batch_size=4, workers=0)
    finally:
        hook.remove()


def test_a_disk_too_small_is_not_filled(
    model: Any, rows: Dataset, collator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.training.features.MOST_OF_THE_DISK", 1e-12)
    with pytest.raises(NotCacheable, match="GiB free disk"):
        cache_features(model, rows, collator, folder=tmp_path, batch_size=4, workers=0)
