"""Writes a training's metrics as TensorBoard event files, for those who watch their trainings there."""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

EVENTS = "tensorboard"
FLUSH_SECONDS = 10


class EventFiles:
    """One scalar a metric and step, in the folder `folder`, which is written anew each time."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_SECONDS)

    def write(self, lines: Iterable[Mapping[str, float]]) -> None:
        """Add the metrics of some steps; each has a `step`."""
        for line in lines:
            for name, value in line.items():
                if name != "step":
                    self._writer.add_scalar(f"train/{name}", value, int(line["step"]))

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()
