"""Runs many trainings for a test after importing torch once: forks the processes of each, as `ranks` would start them.

It notes which samples each process sees and which weights it holds, can have one killed, and lets accelerate shard on a
CPU.
"""

import json
import os
import signal
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer
from trl.trainer.sft_config import SFTConfig

from tasks.training import child, distributed
from tasks.training import model as models
from tasks.training.collate import CompletionCollator
from tasks.training.dataset import read_examples
from tasks.training.ranks import free_port, variables


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train each of `config["trainings"]`, {name: {processes, config, kill}}, in a folder of its name.

    `kill` is null or {rank, at_batch}: that process is killed then, and all start again once. Returns {name: result}.
    """
    torch.set_num_threads(1)
    return {name: _train(folder / name, **training) for name, training in config["trainings"].items()}


def _train(folder: Path, *, processes: int, config: Mapping[str, Any], kill: Mapping[str, int] | None) -> Any:
    folder.mkdir()
    for victim in [kill, None] if kill else [None]:
        port = free_port()
        running = {_fork(rank, processes, port, config, folder, victim) for rank in range(processes)}
        while running:
            pid, status = os.wait()
            running.discard(pid)
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
    return json.loads((folder / "result.json").read_text())


def _fork(
    rank: int, processes: int, port: int, config: Mapping[str, Any], folder: Path, victim: Mapping[str, int] | None
) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(variables(rank, processes, port) if processes > 1 else {})
        at_batch = victim["at_batch"] if victim and victim["rank"] == rank else None
        _note_samples(Path(config["examples"]), folder / f"seen-{rank}.txt", at_batch)
        _note_weights(folder / f"held-{rank}.json")
        _shard_on_cpu()
        _zero3_on_cpu()
        result = child.run(config, folder)
        if rank == 0:
            (folder / "result.json").write_text(json.dumps(result))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _note_samples(train: Path, seen: Path, last: int | None) -> None:
    """Write a line of sample ids for each batch to train on; be killed at the batch with number `last`."""
    collate = CompletionCollator.torch_call
    trained_on = set(read_examples(train)["sample_id"])
    batches = 0

    def noting(self: CompletionCollator, examples: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal batches
        if examples[0]["sample_id"] not in trained_on:
            return collate(self, examples)
        batches += 1
        if batches == last:
            os.kill(os.getpid(), signal.SIGKILL)
        with seen.open("a") as file:
            file.write(" ".join(example["sample_id"] for example in examples) + "\n")
        return collate(self, examples)

    CompletionCollator.torch_call = noting  # type: ignore[method-assign]


def _note_weights(file: Path) -> None:
    """Write how many bytes of weights this process holds: `loaded`, and `shared` with the others."""
    make_trainable, prepare = models.make_trainable, distributed.prepare
    held = {}

    def making_trainable(base: PreTrainedModel, *args: Any, **options: Any) -> Any:
        held["loaded"] = _bytes(base)
        return make_trainable(base, *args, **options)

    def preparing(trainer: Trainer, *args: Any, **options: Any) -> None:
        prepare(trainer, *args, **options)
        held["shared"] = _bytes(trainer.model)
        file.write_text(json.dumps(held))

    models.make_trainable, distributed.prepare = making_trainable, preparing


def _bytes(model: nn.Module) -> int:
    parts = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    return sum(part.nbytes for part in parts if not part.is_meta)


def _shard_on_cpu() -> None:
    """Let accelerate use FSDP2 with gloo: torch can, but accelerate only asks it to on accelerators."""
    init = AcceleratorState.__init__

    def init_with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init_with_fsdp  # type: ignore[method-assign]


def _zero3_on_cpu() -> None:
    """Let transformers and accelerate give DeepSpeed several processes on the CPU, which they only do on GPUs."""

    def arguments(**options: Any) -> SFTConfig:
        if "deepspeed" in options:
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
            options["use_cpu"] = False
        return SFTConfig(**options)

    child.SFTConfig = arguments  # type: ignore[assignment, misc]
