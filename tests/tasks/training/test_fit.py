"""Whole trainings in child processes: lineage, caching, being killed or stopped, failing."""

import importlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from storage.catalog import connect
from storage.refs import Outcome, RunRef, SnapshotRef
from storage.snapshot import commit, read_manifest
from storage.warehouse import Warehouse
from tasks.training import divergence, fit
from tasks.training.base_model import find_base_model
from tasks.training.checkpoints import COMPLETE, last_complete_checkpoint
from tasks.training.dataset import read_examples
from tasks.training.divergence import Diverged, remember
from tasks.training.fit import METRICS, Progress, TrainingDiverged, TrainingFailed, TrainingStopped, train
from tasks.training.process import ChildFailed
from tasks.training.recipe import Recipe, RecipeError
from tests.tasks.squares import curated_rows, publish

Squares = tuple[Warehouse, SnapshotRef]
Trained = tuple[RunRef, list[str]]


def weights(warehouse: Warehouse, run: RunRef) -> dict[str, torch.Tensor]:
    return load_file(warehouse.local_path(f"{run.adapter}/adapter_model.safetensors"))


def row_of(warehouse: Warehouse, run: RunRef) -> dict[str, object]:
    [row] = warehouse.read_table(run.table).to_pylist()
    return dict(row)


def test_a_run_knows_where_it_came_from(squares: Squares, trained: Trained, recipe: Recipe) -> None:
    warehouse, _ = squares
    row = row_of(warehouse, trained[0])
    assert (row["dataset"], row["snapshot"], row["samples"], row["steps"]) == ("squares", 1, 13, 8)
    assert Recipe.model_validate(json.loads(str(row["recipe"]))) == recipe
    assert row["base_model_fingerprint"] == find_base_model(recipe.base_model).fingerprint
    assert Path(str(row["adapter_uri"])).is_dir()
    assert None not in {row[name] for name in set(row) - {"parent_run"}}
    with connect(warehouse) as catalog:
        seen = catalog.execute("SELECT count(*) FROM lineage WHERE run_id = ?", [row["run_id"]]).fetchall()
    assert seen == [(row["samples"],)]


def test_the_adapter_is_peft_and_names_its_base_model(squares: Squares, trained: Trained, recipe: Recipe) -> None:
    warehouse, _ = squares
    run, _ = trained
    assert warehouse.names(run.adapter) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads(warehouse.read_bytes(f"{run.adapter}/adapter_config.json"))
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, recipe.base_model)


def test_training_moved_the_adapter_and_its_loss(squares: Squares, trained: Trained) -> None:
    warehouse, _ = squares
    assert all(tensor.abs().max() > 0 for tensor in weights(warehouse, trained[0]).values())
    losses = warehouse.read_table(f"{trained[0].folder}/metrics.parquet")["loss"].to_pylist()
    assert losses[-1] < losses[0]


def test_every_step_has_metrics(squares: Squares, trained: Trained) -> None:
    warehouse, _ = squares
    metrics = warehouse.read_table(f"{trained[0].folder}/metrics.parquet")
    assert metrics["step"].to_pylist() == list(range(1, 9))
    assert max(metrics["learning_rate"].to_pylist()) == pytest.approx(1e-3)
    assert not any(column.null_count for column in metrics.columns)


def test_nothing_unfinished_is_left(squares: Squares, trained: Trained) -> None:
    warehouse, _ = squares
    assert list(Path(warehouse.root, ".work").iterdir()) == []


def test_the_same_run_is_cached_and_starts_no_process(
    squares: Squares, trained: Trained, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse, snapshot = squares
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    again = train(snapshot, recipe, warehouse=warehouse)
    assert (again.ref, again.cached) == (trained[0], True)


def test_a_policy_that_keeps_the_same_samples_does_not_train_again(
    squares: Squares, trained: Trained, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse, snapshot = squares
    manifest = read_manifest(warehouse, snapshot)
    stricter = commit(warehouse, "stricter", lambda _: replace(manifest, policy={"name": "strict"})).ref
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    assert train(stricter, recipe, warehouse=warehouse) == Outcome(trained[0], cached=True)


def test_what_does_not_change_the_adapter_does_not_change_the_run(
    squares: Squares, trained: Trained, recipe: Recipe, tmp_path: Path
) -> None:
    warehouse, snapshot = squares
    moved = shutil.copytree(recipe.base_model, tmp_path / "elsewhere")
    same = recipe.model_copy(update={"base_model": str(moved), "save_steps": 5, "max_new_tokens": 9})
    assert train(snapshot, same, warehouse=warehouse).ref == trained[0]


def name_of(squares: Squares, recipe: Recipe) -> str:
    return fit._Plan.make(squares[1], recipe, None, squares[0]).run.run_id


@pytest.mark.parametrize(
    "change",
    [
        *({"lora_parts": ("language", "vision")}, {"full_parts": ("projector",)}, {"use_dora": True}),
        *({"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"q_proj": 2}}),
        *({"method": "full", "full_parts": ("language",)}, {"learning_rates": {"language": 1e-5}}),
        *({"scheduler": "linear"}, {"optimizer": "paged_adamw_8bit"}, {"weight_decay": 0.1}),
        *({"max_grad_norm": 0.5}, {"neftune_alpha": 5.0}, {"early_stop_patience": 2}),
    ],
    ids=lambda change: "-".join(change),
)
def test_what_changes_the_adapter_changes_the_run(squares: Squares, recipe: Recipe, change: dict[str, Any]) -> None:
    assert name_of(squares, recipe.model_copy(update=change)) != name_of(squares, recipe)


def test_permission_for_a_rate_does_not_change_the_run(squares: Squares, recipe: Recipe) -> None:
    forbidden = recipe.model_copy(update={"allow_high_learning_rate": False})
    assert name_of(squares, forbidden) == name_of(squares, recipe)


def named(squares: Squares, recipe: Recipe, **change: Any) -> str:
    return name_of(squares, recipe.model_copy(update=change))


def test_sharding_counts_where_it_decides_on_four_bits(squares: Squares, recipe: Recipe) -> None:
    """On GPUs, auto is 4-bit for a LoRA without sharding, and not for one with ZeRO-3."""
    four = {"gpus": 2, "accumulation": 2}
    assert named(squares, recipe, **four, sharding="zero3") != named(squares, recipe, **four)
    assert named(squares, recipe, **four, sharding="fsdp") == named(squares, recipe, **four)
    plain = {**four, "quantization": "none"}
    assert named(squares, recipe, **plain, sharding="zero3") == named(squares, recipe, **plain)


def test_gpus_count_where_batches_are_put_together_for_them(squares: Squares, recipe: Recipe) -> None:
    assert named(squares, recipe, gpus=2) == named(squares, recipe)
    by_tokens = {"tokens_per_batch": 1024}
    assert named(squares, recipe, **by_tokens, gpus=2) != named(squares, recipe, **by_tokens)


def test_the_order_of_patterns_counts_because_the_first_that_matches_wins(squares: Squares, recipe: Recipe) -> None:
    patterns = {"q_proj": 8, r"layers\.0\..*q_proj": 2}
    backwards = dict(reversed(patterns.items()))
    assert named(squares, recipe, rank_pattern=patterns) != named(squares, recipe, rank_pattern=backwards)


def test_fields_without_effect_do_not_change_the_run(squares: Squares, recipe: Recipe) -> None:
    assert named(squares, recipe, max_steps=8, epochs=2.0) == named(squares, recipe, max_steps=8)
    full = {"method": "full", "full_parts": ("language",)}
    assert named(squares, recipe, **full, lora_rank=8, lora_dropout=0.1) == named(squares, recipe, **full)
    assert named(squares, recipe, **full, quantization="none") == named(squares, recipe, **full)


def test_the_steps_between_checkpoints_count_where_one_of_them_is_kept(squares: Squares, recipe: Recipe) -> None:
    often, seldom = ({"save_steps": steps} for steps in (1, 5))
    stopping = recipe.model_copy(update={"early_stop_patience": 2})
    assert name_of(squares, recipe.model_copy(update=often)) == name_of(squares, recipe.model_copy(update=seldom))
    assert name_of(squares, stopping.model_copy(update=often)) != name_of(squares, stopping.model_copy(update=seldom))


def test_stopping_early_looks_at_the_validation_split(
    squares: Squares, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, list[str]] = {}

    def look(_: str, config: dict[str, Any], **__: Any) -> dict[str, Any]:
        seen.update({key: read_examples(Path(config[key]))["sample_id"][:] for key in ("examples", "validation")})
        raise ChildFailed("enough seen")

    monkeypatch.setattr(fit, "run_child", look)
    warehouse, snapshot = publish(tmp_path)
    with pytest.raises(TrainingFailed, match="enough seen"):
        train(snapshot, recipe.model_copy(update={"early_stop_patience": 2}), warehouse=warehouse)
    validation = {row["sample_id"] for row in curated_rows() if row["split"] == "validation"}
    assert set(seen["validation"]) == validation
    assert validation.isdisjoint(seen["examples"])


# What a training that goes on repeats exactly: everything but times and memory.
REPEATED = [name for name in METRICS.names if name not in ("seconds", "input_wait_seconds", "peak_memory_bytes")]


def test_a_run_that_is_killed_and_then_stopped_ends_like_an_undisturbed_one(
    trained: Trained, squares: Squares, recipe: Recipe, tmp_path: Path
) -> None:
    warehouse, snapshot = publish(tmp_path)
    run, _ = trained
    kill_after_a_checkpoint(recipe, tmp_path, run)

    def stop_child(line: str) -> None:
        if line.startswith("going on from checkpoint-"):
            [child] = [c for c in psutil.Process().children() if "tasks.training.child" in c.cmdline()]
            child.terminate()

    with pytest.raises(TrainingStopped, match=rf"run {run.run_id}: stopped after step \d of 8; it goes on from there"):
        train(snapshot, recipe, warehouse=warehouse, on_log=stop_child)
    assert not warehouse.exists(run.table)

    progress: list[Progress] = []
    assert train(snapshot, recipe, warehouse=warehouse, on_progress=progress.append) == Outcome(run, cached=False)
    assert_finished(progress[-1], run)
    expected, found = weights(squares[0], run), weights(warehouse, run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    metrics = f"{run.folder}/metrics.parquet"
    assert warehouse.read_table(metrics, REPEATED) == squares[0].read_table(metrics, REPEATED)


def assert_finished(progress: Progress, run: RunRef) -> None:
    assert (progress.run_id, progress.step, progress.steps, progress.seconds_left) == (run.run_id, 8, 8, 0)
    assert 0 < progress.input_wait_share < 1
    assert progress.tokens_per_second > progress.samples_per_second > 0


def kill_after_a_checkpoint(recipe: Recipe, root: Path, run: RunRef) -> None:
    """Train in a process of its own that is killed, and its child with it, once there is a checkpoint to go on from."""
    checkpoints = root / ".work" / run.run_id / "checkpoints"
    source = (
        "from storage.refs import SnapshotRef\nfrom storage.warehouse import Warehouse\n"
        "from tasks.training.fit import train\nfrom tasks.training.recipe import Recipe\n"
        f"recipe = Recipe.model_validate_json({recipe.model_dump_json()!r})\n"
        f"train(SnapshotRef('squares', 1), recipe, warehouse=Warehouse({str(root)!r}), on_log=print)"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 120
    while last_complete_checkpoint(checkpoints) is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last_complete_checkpoint(checkpoints) is not None
    assert not Warehouse(str(root)).exists(run.table)


def test_a_run_that_diverged_is_not_tried_again_until_something_changed(
    squares: Squares, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse, snapshot = squares
    other = recipe.model_copy(update={"seed": 77})
    calls: list[str] = []

    def diverge(module: str, config: dict[str, Any], *, folder: Path, **_: Any) -> dict[str, Any]:
        calls.append(module)
        remember(Diverged("the loss is not finite", step=3, sample_ids=["a"]), folder)
        raise ChildFailed("ended with exit code 1")

    monkeypatch.setattr(fit, "run_child", diverge)
    for _ in range(2):
        with pytest.raises(TrainingDiverged, match="the loss is not finite in step 3, with samples a"):
            train(snapshot, other, warehouse=warehouse)
    assert len(calls) == 1
    monkeypatch.setattr(divergence, "versions", lambda: {"torch": "99"})
    with pytest.raises(TrainingDiverged):
        train(snapshot, other, warehouse=warehouse)
    assert len(calls) == 2


def test_tensorboard_shows_the_metrics(squares: Squares, trained: Trained) -> None:
    warehouse, _ = squares
    run, _ = trained
    events = EventAccumulator(str(warehouse.local_path(run.event_files)))
    events.Reload()
    metrics = warehouse.read_table(f"{run.folder}/metrics.parquet").to_pylist()
    assert {f"train/{name}" for name in metrics[0]} - {"train/step"} == set(events.Tags()["scalars"])
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == pytest.approx({line["step"]: line["loss"] for line in metrics})


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_finished_training_whose_publication_was_cut_is_not_repeated(
    squares: Squares, trained: Trained, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse, snapshot = publish(tmp_path)
    run, _ = trained
    scratch = tmp_path / ".work" / run.run_id
    shutil.copytree(squares[0].local_path(run.adapter), scratch / "adapter")
    record = json.loads(squares[0].read_bytes(f"{run.folder}/record.json"))
    (scratch / "result.json").write_text(json.dumps(record["result"]))
    metrics = squares[0].read_table(f"{run.folder}/metrics.parquet").to_pylist()
    (scratch / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    monkeypatch.setattr(subprocess, "Popen", pytest.fail)
    assert train(snapshot, recipe, warehouse=warehouse).ref == run
    assert row_of(warehouse, run)["train_loss"] == row_of(squares[0], run)["train_loss"]


def test_a_failure_shows_what_the_child_said_last(squares: Squares, recipe: Recipe, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(recipe.base_model, tmp_path / "broken"))
    template = (broken / "chat_template.jinja").read_text()
    (broken / "chat_template.jinja").write_text(template.replace("text + '<turn|>'", "text"))
    warehouse, snapshot = squares
    with pytest.raises(TrainingFailed) as caught:
        train(snapshot, recipe.model_copy(update={"base_model": str(broken)}), warehouse=warehouse)
    assert "ended with exit code 1" in str(caught.value)
    assert "TemplateError: the chat template of Gemma4Processor leaves out what ends an answer" in str(caught.value)


def test_a_parent_run_must_have_the_same_lora(squares: Squares, trained: Trained, recipe: Recipe) -> None:
    warehouse, snapshot = squares
    wider = recipe.model_copy(update={"lora_rank": 16})
    with pytest.raises(
        RecipeError, match=f"lora_rank: is 16, but the adapter of the parent run {trained[0].run_id} has 4"
    ):
        train(snapshot, wider, warehouse=warehouse, parent_run=trained[0])


def test_a_run_can_start_from_another(
    squares: Squares, trained: Trained, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(module: str, config: dict[str, Any], *, folder: Path, **_: Any) -> dict[str, Any]:
        return dict(importlib.import_module(module).run(config, folder))

    monkeypatch.setattr(fit, "run_child", run_here)  # a process of its own would only cost time
    warehouse, snapshot = squares
    still = recipe.model_copy(update={"learning_rate": 1e-12, "max_steps": 1})
    child = train(snapshot, still, warehouse=warehouse, parent_run=trained[0]).ref
    assert row_of(warehouse, child)["parent_run"] == trained[0].run_id
    before, after = weights(warehouse, trained[0]), weights(warehouse, child)
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
