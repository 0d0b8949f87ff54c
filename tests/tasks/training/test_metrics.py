"""Metrics of a training that goes on: every step once, whatever the end before left."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from tasks.training.metrics import METRICS, KeepMetrics, read_metrics

ANY: Any = None


def logs(loss: float) -> dict[str, float]:
    rates = {"mean_token_accuracy": 0.5, "entropy": 1.0, "learning_rate": 1e-3, "grad_norm": 2.0}
    counts = {"samples": 4, "tokens": 400, "micro_batch": 2, "input_wait_seconds": 0.0}
    return {"loss": loss, **rates, **counts}


def steps(folder: Path, *, done: int, losses: list[float], first: bool = True) -> None:
    """Log steps after those that are done, as a trainer would."""
    keep = KeepMetrics(folder)
    state = TrainerState(global_step=done, max_steps=8, is_world_process_zero=first)
    keep.on_train_begin(ANY, state, TrainerControl())
    for loss in losses:
        state.global_step += 1
        keep.on_log(ANY, state, TrainerControl(), logs(loss))
    keep.on_train_end(ANY, state, TrainerControl())


def losses_in_tensorboard(folder: Path) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


def test_steps_done_again_replace_those_after_the_checkpoint(tmp_path: Path) -> None:
    steps(tmp_path, done=0, losses=[8.0, 7.0, 6.0])
    steps(tmp_path, done=2, losses=[6.5, 5.5])
    assert [line["loss"] for line in read_metrics(tmp_path)] == [8.0, 7.0, 6.5, 5.5]
    assert losses_in_tensorboard(tmp_path) == {1: 8.0, 2: 7.0, 3: 6.5, 4: 5.5}


def test_a_line_that_a_kill_tore_is_dropped(tmp_path: Path) -> None:
    steps(tmp_path, done=0, losses=[8.0, 7.0])
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 3, "lo')
    steps(tmp_path, done=2, losses=[6.0])
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    steps(tmp_path, done=0, losses=[8.0], first=False)
    assert list(tmp_path.iterdir()) == []


def test_reports_are_of_all_steps_since_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(100))
    monkeypatch.setattr("tasks.training.metrics.time.monotonic", lambda: float(next(now)))
    monkeypatch.setattr("tasks.training.metrics.REPORT_SECONDS", 3.0)
    steps(tmp_path, done=0, losses=[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
    reports = [json.loads(line[1:]) for line in capsys.readouterr().out.split("\n") if line.startswith("\x1e")]
    assert [report["step"] for report in reports] == [1, 4, 7]
    assert [report["seconds_left"] for report in reports[1:]] == [4.0, 1.0]
    assert [report["tokens_per_second"] for report in reports[1:]] == [400.0, 400.0]
