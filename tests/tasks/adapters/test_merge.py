"""Merging, at full precision and from a 4-bit base, and the distance it reports."""

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.special import rel_entr, softmax
from transformers import AutoModelForMultimodalLM, AutoProcessor

from storage.refs import RunRef, SnapshotRef
from storage.warehouse import Warehouse
from tasks.adapters.child import compare, completion_logits
from tasks.adapters.child import merge as merge_weights
from tasks.adapters.merge import merge
from tasks.training import model as models
from tasks.training.collate import CompletionCollator
from tasks.training.dataset import read_examples, write_examples
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids

Squares = tuple[Warehouse, SnapshotRef]
Trained = tuple[RunRef, list[str]]


@pytest.fixture(scope="module")
def merged(squares: Squares, trained: Trained) -> Any:
    return merge(trained[0], warehouse=squares[0])


def test_a_merged_model_says_what_adapter_on_base_says(squares: Squares, merged: Any, trained: Trained) -> None:
    [row] = squares[0].read_table(merged.ref.table).to_pylist()
    assert (row["run_id"], row["method"]) == (trained[0].run_id, "merge in float32")
    assert 0 <= row["kl_per_token"] < 1e-9
    assert row["max_logit_difference"] < 1e-3
    assert row["agreement"] == 1
    assert row["tokens"] >= 2 * 5  # five validation samples, each an answer and a stop token
    assert None not in row.values()


def test_the_merged_folder_is_an_ordinary_model(squares: Squares, merged: Any, gemma: Path) -> None:
    folder = squares[0].local_path(merged.ref.model)
    assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json", ".jinja"}
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    assert (
        not models.linear_names(model).keys()
        - models.linear_names(AutoModelForMultimodalLM.from_pretrained(gemma)).keys()
    )
    assert AutoProcessor.from_pretrained(folder).chat_template == (gemma / "chat_template.jinja").read_text()


def test_merging_changed_the_language_models_weights_only(squares: Squares, merged: Any, gemma: Path) -> None:
    after = load_file(squares[0].local_path(merged.ref.model) / "model.safetensors")
    before = load_file(gemma / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert changed == {name for name in before if "language_model" in name and name.endswith("_proj.weight")}


def test_the_same_merge_is_cached(
    squares: Squares, merged: Any, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    again = merge(trained[0], warehouse=squares[0])
    assert (again.ref, again.cached) == (merged.ref, True)


def test_a_four_bit_base_is_merged_without_a_gap(
    squares: Squares, trained: Trained, recipe: Recipe, gemma: Path, tmp_path: Path
) -> None:
    warehouse, snapshot = squares
    plain = recipe.model_copy(update={"precision": "bf16"})
    four_bit = plain.model_copy(update={"quantization": "nf4"})
    placement = models.place(four_bit)
    written = write_examples(
        snapshot, four_bit, split="validation", warehouse=warehouse, path=tmp_path / "examples.arrow"
    )
    rows = read_examples(written.path, limit=2)
    adapter = warehouse.local_path(trained[0].adapter)
    adapted = models.load_adapter(models.load_model(gemma, placement), adapter)
    processor: Any = models.load_processor(gemma, four_bit)
    collator = CompletionCollator(processor, completion_only_loss=True, stop_ids=stop_ids(adapted.get_base_model()))

    expected = completion_logits(adapted, collator, rows, placement)
    model = merge_weights(models.load_model(gemma, placement), adapter)
    assert not any(map(models.is_four_bit, model.modules()))
    gap = compare(expected, completion_logits(model, collator, rows, placement))

    original = models.load_model(gemma, models.place(plain))
    onto_original = merge_weights(original, adapter)
    other_gap = compare(expected, completion_logits(onto_original, collator, rows, placement))
    assert gap["kl_per_token"] < 2e-3
    assert gap["kl_per_token"] < other_gap["kl_per_token"] / 5


def test_the_distance_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(2, 5, 7)), rng.normal(size=(2, 5, 7))
    found = compare([torch.tensor(a) for a in before], [torch.tensor(b) for b in after])
    kl = rel_entr(softmax(before, axis=-1), softmax(after, axis=-1)).sum(axis=-1)
    assert found["tokens"] == 10
    assert found["kl_per_token"] == pytest.approx(kl.mean())
    assert found["max_logit_difference"] == pytest.approx(np.abs(before - after).max())
    assert found["agreement"] == pytest.approx((before.argmax(-1) == after.argmax(-1)).mean())
