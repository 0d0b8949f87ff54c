"""Keeps a training's metrics: one JSON line a step in a file, and now and then a line in the log."""

import json
import logging
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
PRINT_SECONDS = 5.0


class WriteMetrics(TrainerCallback):
    """Writes a line of metrics for every step and prints one now and then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.printed = self.last = time.monotonic()
        self.tokens = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Drop the lines of steps that a resumed training does again."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.write_text("".join(f"{line}\n" for line in lines[: state.global_step]))
        self.last = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the step's line."""
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "token_accuracy": logs["mean_token_accuracy"],
            "entropy": logs["entropy"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": int(logs["num_tokens"]) - self.tokens,
            "seconds": now - self.last,
        }
        self.last, self.tokens = now, int(logs["num_tokens"])
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if now - self.printed >= PRINT_SECONDS or state.global_step in (1, state.max_steps):
            self.printed = now
            log.info(
                "step %d of %d: loss %.4f, token accuracy %.3f, %.0f tokens/s",
                *(line["step"], state.max_steps, line["loss"], line["token_accuracy"]),
                line["tokens"] / line["seconds"],
            )
