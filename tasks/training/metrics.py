"""Keeps a training's metrics: a line for every step in a file and in TensorBoard's, and word of it now and then."""

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.training.child_side import report
from tasks.training.event_files import EVENTS, EventFiles

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
REPORT_SECONDS = 5.0

Line = dict[str, float]


class KeepMetrics(TrainerCallback):
    """Writes the metrics of every step into a folder, and reports them now and then.

    What `fit.METRICS` describes goes into `metrics.jsonl` and `tensorboard/`. Of several processes the first writes.
    `passes` over the samples are what the trainer takes for one epoch.
    """

    def __init__(self, folder: Path, *, passes: float = 1.0) -> None:
        self.folder, self.passes = folder, passes
        self.last = self.reported = time.monotonic()
        self.since: list[Line] = []  # steps not reported yet
        self.events: EventFiles | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines of steps that a training that goes on does again."""
        self.last = self.reported = time.monotonic()
        if not state.is_world_process_zero:
            return
        lines = read_metrics(self.folder, state.global_step)
        (self.folder / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        self.events = EventFiles(self.folder / EVENTS)
        self.events.write(lines)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the step's line."""
        if not logs or "loss" not in logs or self.events is None:
            return
        now = time.monotonic()
        line = {
            "step": state.global_step,
            "epoch": (state.epoch or 0.0) * self.passes,
            "loss": logs["loss"],
            "token_accuracy": logs["mean_token_accuracy"],
            "entropy": logs["entropy"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "samples": logs["samples"],
            "tokens": logs["tokens"],
            "micro_batch": logs["micro_batch"],
            "seconds": now - self.last,
            "input_wait_seconds": logs["input_wait_seconds"],
            "peak_memory_bytes": peak_memory(),
        }
        self.last = now
        self.since.append(line)
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.events.write([line])
        if now - self.reported >= REPORT_SECONDS or state.global_step in (1, state.max_steps):
            self._report(state.max_steps)
            self.reported = now

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Let go of the event file."""
        if self.events is not None:
            self.events.close()

    def _report(self, steps: int) -> None:
        """Say how the steps since the last report went, to the log and to the process that waits for this one."""
        seconds, last = sum(line["seconds"] for line in self.since), self.since[-1]
        figures = {
            "step": last["step"],
            "steps": steps,
            "loss": last["loss"],
            "token_accuracy": last["token_accuracy"],
            "learning_rate": last["learning_rate"],
            "tokens_per_second": sum(line["tokens"] for line in self.since) / seconds,
            "samples_per_second": sum(line["samples"] for line in self.since) / seconds,
            "input_wait_share": sum(line["input_wait_seconds"] for line in self.since) / seconds,
            "peak_memory_bytes": last["peak_memory_bytes"],
            "seconds_left": (steps - last["step"]) * seconds / len(self.since),
        }
        self.since = []
        log.info(
            "step %d of %d: loss %.4f, token accuracy %.3f, %.0f tokens/s",
            *(figures[name] for name in ("step", "steps", "loss", "token_accuracy", "tokens_per_second")),
        )
        report(figures)


def read_metrics(folder: Path, steps: int | None = None) -> list[Line]:
    """Return the metrics of all steps done in `folder`, or of the first `steps`: only those a kill can't have torn."""
    path = folder / METRICS
    return [json.loads(line) for line in path.read_text().splitlines()[:steps]] if path.exists() else []


def peak_memory() -> int:
    """Return the most memory that tensors had on the GPU so far, or this process in RAM if there is no GPU, bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
