"""Tells whole checkpoints from half-written ones: the mark that makes one count is written last."""

from pathlib import Path
from typing import Any

from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.training.recipe import Recipe

COMPLETE = "complete"


def checkpoints_folder(folder: Path, recipe: Recipe) -> Path:
    """Return where checkpoints go: those of a sharded model are of another form, which only such a training reads."""
    return folder / ("checkpoints" if recipe.sharding == "none" else f"checkpoints-{recipe.sharding}")


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose last file was written, or None. What a kill left half-written is ignored."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class MarkComplete(TrainerCallback):
    """Marks each checkpoint once all of it is written."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint of this step, when every process has written its part."""
        assert args.output_dir is not None
        if args.world_size > 1:
            distributed.barrier()
        if state.is_world_process_zero:
            Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE).touch()
