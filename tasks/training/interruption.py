"""Ends a training when SIGTERM asks for it: after the step under way, with a checkpoint to go on from.

A machine that is about to be taken away, a cancelled flow and a user's `kill` all ask with that signal.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

log = logging.getLogger(__name__)


class StopWhenAsked(TrainerCallback):
    """Saves and stops at the end of the step in which one of the training's processes was asked to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM as the request while the block runs."""
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decide together with the other processes, if there are any: all must stop after the same step."""
        if args.world_size > 1:
            asked = torch.tensor(int(self.asked), device=args.device)
            distributed.all_reduce(asked, distributed.ReduceOp.MAX)
            self.asked = bool(asked)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def _ask(self, *_: Any) -> None:
        if not self.asked:
            log.info("asked to stop: saving a checkpoint at the end of this step")
        self.asked = True
