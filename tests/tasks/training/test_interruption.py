"""SIGTERM ends a training after the step under way, and of several processes all after the same step."""

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed
from transformers import TrainerControl, TrainerState

from tasks.training.interruption import StopWhenAsked


def end_step(stop: StopWhenAsked, processes: int = 1) -> TrainerControl:
    control = TrainerControl()
    args: Any = SimpleNamespace(world_size=processes, device=torch.device("cpu"))
    stop.on_step_end(args, TrainerState(), control)
    return control


def test_nothing_stops_unasked() -> None:
    control = end_step(StopWhenAsked())
    assert not control.should_save
    assert not control.should_training_stop


def test_sigterm_saves_and_stops_at_the_end_of_the_step() -> None:
    stop = StopWhenAsked()
    before = signal.getsignal(signal.SIGTERM)
    with stop.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # asking twice is no more than asking once
    control = end_step(stop)
    assert control.should_save
    assert control.should_training_stop
    assert signal.getsignal(signal.SIGTERM) == before


def stop_with_others(rank: int, store: Path, answers: Any) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    stop = StopWhenAsked()
    first = end_step(stop, processes=2).should_training_stop
    stop.asked = rank == 1  # only this process got the signal
    second = end_step(stop, processes=2)
    answers.put((rank, first, second.should_training_stop, second.should_save))
    distributed.destroy_process_group()


def test_all_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    processes = [
        context.Process(target=stop_with_others, args=(rank, tmp_path / "store", answers)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    assert sorted(answers.get() for _ in processes) == [(rank, False, True, True) for rank in range(2)]
    for process in processes:
        process.join()
