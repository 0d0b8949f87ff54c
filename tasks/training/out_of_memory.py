"""Computes batches in smaller pieces once memory runs out, without changing which samples a step learns from.

The samples, their order and the loss, a mean over the step's supervised tokens, do not depend on how it is cut.
"""

import json
import logging
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

log = logging.getLogger(__name__)

OUT_OF_MEMORY = "out_of_memory.jsonl"
REMEDY = (
    "Recompute more activations (checkpointing), lower max_image_tokens, hold the base model in 4 bits "
    "(quantization: nf4) or use a smaller lora_rank."
)

Row = dict[str, Any]
Inputs = dict[str, Any]
Batch = dict[str, Any]
"""A collated batch: `pieces`, the model's inputs for each, and `sample_ids`, which samples each of them holds."""


class OutOfMemory(RuntimeError):  # noqa: N818 - says what happened
    """A training does not fit into memory even in the smallest pieces; the message says what to change."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed on the GPU, or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


class Pieces:
    """In how many pieces each batch is computed: in one, and in twice as many each time memory runs out.

    Each time is a line of the file `path`: step, samples that were too many, pieces from then on, device. A training
    that goes on with the file on the same device starts where the last one was.
    """

    def __init__(self, path: Path, *, device: str) -> None:
        self.path, self.device = path, device
        # the data loader's workers cut what they collate: they must see the number change
        self._count = multiprocessing.Value("i", 1, lock=False)
        if known := [event["pieces"] for event in self.events if event["device"] == device]:
            self._count.value = known[-1]

    @property
    def count(self) -> int:
        """Pieces that a batch is cut into, if it has that many samples."""
        return int(self._count.value)

    @property
    def events(self) -> list[dict[str, Any]]:
        """Every time memory ran out, oldest first."""
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def cut(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """Cut a batch into pieces of equal size, or almost."""
        count, size = min(self.count, len(rows)), len(rows)
        return [rows[at * size // count : (at + 1) * size // count] for at in range(count)]

    def double(self, *, step: int, samples: int) -> None:
        """Cut batches into twice as many pieces from now on, because `samples` at once did not fit in `step`."""
        self._count.value *= 2
        event = {"step": step, "samples": samples, "pieces": self.count, "device": self.device}
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")
        log.warning(
            "out of memory in step %d with %d samples at once: every batch is computed in %d pieces from here on. "
            "A step has the same samples and the same loss as before; it takes longer.",
            *(step, samples, self.count),
        )


class CutCollator:
    """Collates a batch piece by piece with another collator, and notes which samples are in each piece."""

    def __init__(self, collator: Callable[[list[Row]], Inputs], pieces: Pieces) -> None:
        self.collator, self.pieces = collator, pieces

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the batch of these rows; each has a sample_id."""
        cut = self.pieces.cut(rows)
        return {
            "pieces": [self.collator(list(piece)) for piece in cut],
            "sample_ids": [[str(row["sample_id"]) for row in piece] for piece in cut],
        }
