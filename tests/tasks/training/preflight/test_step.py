"""The step as a whole: its table, its cache, and how it fails."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from storage.catalog import connect
from storage.refs import Outcome, PreflightRef, RunRef, SnapshotRef
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.dataset import write_examples
from tasks.training.preflight import child, step
from tasks.training.preflight.child import run_checks
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.setup import Setup
from tasks.training.preflight.step import PreflightFailed, preflight
from tasks.training.recipe import Recipe, RecipeError
from tests.tasks.squares import publish

Squares = tuple[Warehouse, SnapshotRef]
GOOD = Finding("loss mask", "8 samples", "ok", "3-3 tokens", "the completion")
BAD = Finding("images", "8 samples", "failed", "changes by 0 nats", "a change", "Pass pixel_values on.")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Squares:
    """A warehouse of this module's own."""
    return publish(tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module")
def passed(published: Squares, recipe: Recipe) -> tuple[PreflightRef, list[str]]:
    """A preflight in its own process, and its log."""
    log: list[str] = []
    return preflight(published[1], recipe, warehouse=published[0], on_log=log.append).ref, log


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the child process find what a test wants."""

    def finds(*findings: Finding) -> None:
        result = {"findings": [asdict(finding) for finding in findings], "modules": [], "spans": []}
        monkeypatch.setattr(step, "run_child", lambda *_, **__: result)

    return finds


def test_a_sound_training_passes_every_check(published: Squares, passed: tuple[PreflightRef, list[str]]) -> None:
    warehouse, _ = published
    rows = warehouse.read_table(passed[0].table).to_pylist()
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["check"] for row in rows} >= {
        *("loss mask", "prompt", "trained layers", "quantisation", "checkpointing", "images", "learning"),
        *("learning rate", "length", "readable images", "answers", "contamination"),
    }
    assert {(row["preflight_id"], row["dataset"], row["snapshot"]) for row in rows} == {
        (passed[0].preflight_id, "squares", 1)
    }
    assert warehouse.read_table(passed[0].modules).num_rows > 10
    assert "green square<turn|>" in warehouse.read_table(passed[0].spans)["text"].to_pylist()
    assert any(line.startswith("learning: ok (") for line in passed[1])


def test_the_catalog_has_the_findings(published: Squares, passed: tuple[PreflightRef, list[str]]) -> None:
    with connect(published[0]) as catalog:
        query = 'SELECT status FROM preflights WHERE preflight_id = ? AND "check" = ?'
        assert catalog.execute(query, [passed[0].preflight_id, "images"]).fetchall() == [("ok",)]


def test_a_preflight_that_passed_is_cached_and_starts_no_process(
    published: Squares, passed: tuple[PreflightRef, list[str]], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "run_child", pytest.fail)
    assert preflight(published[1], recipe, warehouse=published[0]) == Outcome(passed[0], cached=True)
    longer = recipe.model_copy(update={"max_steps": 99, "save_steps": 7})
    assert preflight(published[1], longer, warehouse=published[0]) == Outcome(passed[0], cached=True)


@pytest.mark.parametrize("change", [{"learning_rate": 1e-4}, {"lora_targets": "q_proj"}, {"batch_size": 1}])
def test_what_a_finding_depends_on_is_checked_anew(
    published: Squares, recipe: Recipe, found: Callable[..., None], change: dict[str, Any]
) -> None:
    found(GOOD)
    assert not preflight(published[1], recipe.model_copy(update=change), warehouse=published[0]).cached


def test_another_device_is_checked_anew(
    published: Squares,
    passed: tuple[PreflightRef, list[str]],
    recipe: Recipe,
    found: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found(GOOD)
    monkeypatch.setattr(step, "describe_device", lambda: "a small card, 8 GiB")
    assert preflight(published[1], recipe, warehouse=published[0]).ref != passed[0]


def test_a_failure_is_raised_with_every_remedy_after_the_table_is_written(
    recipe: Recipe, tmp_path: Path, found: Callable[..., None]
) -> None:
    warehouse, snapshot = publish(tmp_path)
    found(GOOD, BAD)
    with pytest.raises(PreflightFailed) as caught:
        preflight(snapshot, recipe, warehouse=warehouse)
    message = str(caught.value)
    assert "failed checks: 1" in message
    assert "images: 8 samples: changes by 0 nats; wanted: a change. Pass pixel_values on." in message
    rows = warehouse.read_table(caught.value.ref.table).to_pylist()
    assert [row["status"] for row in rows][:2] == ["ok", "failed"]


def test_a_failed_preflight_is_tried_again(recipe: Recipe, tmp_path: Path, found: Callable[..., None]) -> None:
    warehouse, snapshot = publish(tmp_path)
    found(BAD)
    with pytest.raises(PreflightFailed):
        preflight(snapshot, recipe, warehouse=warehouse)
    found(GOOD)
    assert not preflight(snapshot, recipe, warehouse=warehouse).cached
    with connect(warehouse) as catalog:
        assert len(catalog.execute("SELECT DISTINCT preflight_id FROM preflights").fetchall()) == 2


def test_a_model_that_can_not_be_loaded_as_asked_is_a_finding_too(
    recipe: Recipe, tmp_path: Path, published: Squares, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(module: str, config: dict[str, Any], *, folder: Path, **_: Any) -> dict[str, Any]:
        return child.run(config, folder)

    monkeypatch.setattr(step, "run_child", run_here)  # a process of its own would only cost time
    broken = Path(shutil.copytree(recipe.base_model, tmp_path / "broken"))
    (broken / "chat_template.jinja").unlink()
    with pytest.raises(PreflightFailed, match="has no chat template") as caught:
        preflight(published[1], recipe.model_copy(update={"base_model": str(broken)}), warehouse=published[0])
    [row] = [r for r in published[0].read_table(caught.value.ref.table).to_pylist() if r["status"] == "failed"]
    assert row["check"] == "loading"


def test_a_parent_run_that_does_not_fit_is_refused_before_a_model_is_loaded(
    squares: Squares, trained: tuple[RunRef, list[str]], recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "run_child", pytest.fail)
    wider = recipe.model_copy(update={"lora_rank": 16})
    with pytest.raises(RecipeError, match=r"lora_rank: is 16, but the adapter of the parent run"):
        preflight(squares[1], wider, warehouse=squares[0], parent_run=trained[0])


def test_a_model_that_only_several_gpus_hold_is_checked_without_weights(
    recipe: Recipe, published: Squares, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "has_room_for_all", lambda *_: False)
    monkeypatch.setattr(models, "load_model", pytest.fail)
    shared = recipe.model_copy(update={"gpus": 2, "sharding": "fsdp"})
    examples = write_examples(published[1], shared, split="train", warehouse=published[0], path=tmp_path / "e.arrow")
    config = {"recipe": shared.model_dump(), "model": recipe.base_model, "examples": str(examples.path)}
    result = child.run({**config, "parent_adapter": None}, tmp_path)
    found = {finding["check"]: finding for finding in result["findings"]}
    left_out = {name for name, finding in found.items() if finding["measured"].startswith("left out: one device can't")}
    assert left_out == {"gradients", "images", "learning"}
    assert {found[name]["status"] for name in left_out} == {"noted"}
    assert {finding["status"] for name, finding in found.items() if name not in left_out} == {"ok"}
    assert {"loss mask", "trained layers", "memory"} <= found.keys()
    assert result["modules"]


def test_a_check_that_can_not_be_finished_has_failed(shared_setup: Setup) -> None:
    def check_luck(setup: Setup) -> list[Finding]:
        raise RuntimeError("shapes differ")

    [finding] = run_checks(shared_setup, (check_luck,))
    assert (finding.check, finding.status, finding.measured) == (
        "luck",
        "failed",
        "ended with RuntimeError: shapes differ",
    )
