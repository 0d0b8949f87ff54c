"""Answers of the shipped model, batched and one by one, and whole evaluations in a child process."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from storage.refs import RunRef, SnapshotRef
from storage.warehouse import Warehouse, WarehouseError
from tasks.evaluation.child import answer
from tasks.evaluation.generate import evaluate
from tasks.evaluation.metrics import is_exact_match, wilson_interval
from tasks.training import model as models
from tasks.training.dataset import read_examples, write_examples
from tasks.training.recipe import Recipe, RecipeError
from tasks.training.template import render_prompt, stop_ids

Squares = tuple[Warehouse, SnapshotRef]


@pytest.fixture(scope="module")
def placement(recipe: Recipe) -> models.Placement:
    return models.place(recipe)


@pytest.fixture(scope="module")
def processor(gemma: Path, recipe: Recipe) -> Any:
    return models.load_processor(gemma, recipe)


@pytest.fixture(scope="module")
def model(gemma: Path, placement: models.Placement) -> Any:
    return models.load_model(gemma, placement).eval()


@pytest.fixture(scope="module")
def rows(squares: Squares, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Prompts of different lengths, so that batches are padded."""
    warehouse, snapshot = squares
    path = tmp_path_factory.mktemp("rows") / "examples.arrow"
    uneven = recipe.model_copy(update={"prompt": "left(caption, 4 + 5 * (length(caption) % 4))"})
    return read_examples(write_examples(snapshot, uneven, split="test", warehouse=warehouse, path=path).path)


def answers_of(model: Any, processor: Any, placement: models.Placement, rows: Dataset) -> list[str]:
    found = answer(model, processor, rows, placement=placement, stops=stop_ids(model), max_new_tokens=6)
    return [row["answer"] for row in found]


def test_padding_a_batch_changes_no_answer(
    model: Any, processor: Any, placement: models.Placement, rows: Dataset
) -> None:
    assert len({len(render_prompt(processor, row)) for row in rows}) > 1
    together = answers_of(model, processor, placement, rows)
    alone = [answers_of(model, processor, placement, rows.select([at]))[0] for at in range(len(rows))]
    assert together == alone


def test_answers_are_the_most_likely_tokens_one_by_one(
    model: Any, processor: Any, placement: models.Placement, rows: Dataset
) -> None:
    row = rows[0]
    inputs = processor(images=[row["images"]], text=[render_prompt(processor, row)], return_tensors="pt")
    prompt = inputs["input_ids"].shape[1]
    for _ in range(6):
        with torch.no_grad():
            token = model(**inputs).logits[:, -1:].argmax(-1)
        if int(token) in stop_ids(model):
            break
        grown = {"input_ids": token, "attention_mask": torch.ones_like(token), "mm_token_type_ids": token * 0}
        inputs = {**inputs, **{name: torch.cat([inputs[name], more], dim=1) for name, more in grown.items()}}
    expected = processor.tokenizer.decode(inputs["input_ids"][0, prompt:], skip_special_tokens=True)
    assert answers_of(model, processor, placement, rows.select([0])) == [expected]


def test_an_answer_cut_at_the_longest_length_says_so(
    model: Any, processor: Any, placement: models.Placement, rows: Dataset
) -> None:
    found = answer(model, processor, rows, placement=placement, stops=stop_ids(model), max_new_tokens=1)
    assert {row["stopped"] for row in found} == {False}


@pytest.fixture(scope="module")
def evaluated(squares: Squares, recipe: Recipe, trained: tuple[RunRef, list[str]]) -> tuple[Any, list[str]]:
    warehouse, snapshot = squares
    log: list[str] = []
    outcome = evaluate(snapshot, recipe, run=trained[0], warehouse=warehouse, split="test", limit=4, on_log=log.append)
    return outcome, log


def test_the_score_is_that_of_the_answers(squares: Squares, evaluated: tuple[Any, list[str]]) -> None:
    warehouse, _ = squares
    [row] = warehouse.read_table(evaluated[0].ref.table).to_pylist()
    answers = warehouse.read_table(evaluated[0].ref.answers).to_pylist()
    matches = [is_exact_match(a["answer"], a["expected"]) for a in answers]
    assert [a["correct"] for a in answers] == matches
    share = wilson_interval(sum(matches), 4)
    assert (row["samples"], row["exact_match"]) == (4, share.value)
    assert (row["exact_match_low"], row["exact_match_high"]) == (share.low, share.high)
    assert None not in row.values()


def test_answers_belong_to_the_splits_first_samples(squares: Squares, evaluated: tuple[Any, list[str]]) -> None:
    warehouse, _ = squares
    shards = [warehouse.read_table(f"snapshots/squares/curated/{name}.parquet").to_pylist() for name in "ab"]
    test = sorted(row["sample_id"] for shard in shards for row in shard if row["split"] == "test")
    answers = warehouse.read_table(evaluated[0].ref.answers)
    assert answers["sample_id"].to_pylist() == test[:4]
    assert all(prompt.endswith("<|turn>model\n") for prompt in answers["prompt"].to_pylist())


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_or_something_out_is_refused(squares: Squares, recipe: Recipe, limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit: is {limit}. Write how many prompts to answer, 1 or more"):
        evaluate(squares[1], recipe, run=None, warehouse=squares[0], limit=limit)


def test_the_adapter_is_on(evaluated: tuple[Any, list[str]]) -> None:
    assert "4 prompts for base model and adapter" in evaluated[1]


def test_the_same_evaluation_is_cached(
    squares: Squares,
    recipe: Recipe,
    trained: tuple[RunRef, list[str]],
    evaluated: tuple[Any, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warehouse, snapshot = squares
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    again = evaluate(snapshot, recipe, run=trained[0], warehouse=warehouse, split="test", limit=4)
    assert (again.ref, again.cached) == (evaluated[0].ref, True)


def test_an_adapter_is_not_put_on_another_base_model(
    squares: Squares, recipe: Recipe, trained: tuple[RunRef, list[str]], tmp_path: Path
) -> None:
    warehouse, snapshot = squares
    for file in Path(recipe.base_model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text("{}")
    other = recipe.model_copy(update={"base_model": str(tmp_path)})
    with pytest.raises(RecipeError, match=f"run {trained[0].run_id} was trained on"):
        evaluate(snapshot, other, run=trained[0], warehouse=warehouse)


def test_an_unknown_run_is_named_with_those_there_are(
    squares: Squares, recipe: Recipe, trained: tuple[RunRef, list[str]]
) -> None:
    warehouse, snapshot = squares
    with pytest.raises(WarehouseError, match=f"no finished run 'nope'.*{trained[0].run_id}"):
        evaluate(snapshot, recipe, run=RunRef("nope"), warehouse=warehouse)
