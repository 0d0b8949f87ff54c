"""The training process with three additions for tests: it notes what it sees, can be killed, and shards on a CPU."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from tasks.training import child
from tasks.training.collate import CompletionCollator

KILLED = "killed"


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train as `child.run` does; `config` may also hold kill {rank, at_batch}."""
    _note_samples(folder, config.get("kill"))
    if not torch.cuda.is_available():
        _shard_on_cpu()
    return child.run(config, folder)


def _note_samples(folder: Path, kill: Mapping[str, int] | None) -> None:
    """Write a line of sample ids for each batch to `seen-RANK.txt`, or end at one of them as if killed, once."""
    rank = int(os.environ.get("RANK", "0"))
    collate = CompletionCollator.torch_call
    seen = folder / f"seen-{rank}.txt"
    batches = 0

    def noting(self: CompletionCollator, examples: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal batches
        batches += 1
        if kill and kill["rank"] == rank and batches == kill["at_batch"] and not (folder / KILLED).exists():
            (folder / KILLED).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with seen.open("a") as file:
            file.write(" ".join(example["sample_id"] for example in examples) + "\n")
        return collate(self, examples)

    CompletionCollator.torch_call = noting  # type: ignore[method-assign]


def _shard_on_cpu() -> None:
    """Let accelerate use FSDP2 with gloo: torch can, accelerate only asks for it on accelerators."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp  # type: ignore[method-assign]
