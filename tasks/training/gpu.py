"""Keeps two trainings off the same GPU with a file lock that the kernel releases when its holders are gone."""

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Reservation:
    """What a child process needs to use the reserved device: environment variables, and the lock it must keep open."""

    environment: Mapping[str, str] = field(default_factory=dict)
    locks: tuple[int, ...] = ()


NO_GPU = Reservation()


@contextmanager
def reserved_gpu(on_log: Callable[[str], None]) -> Iterator[Reservation]:
    """Wait until one of this machine's visible GPUs is free and hold it; without GPUs, reserve nothing.

    A child that inherits the lock keeps the GPU reserved even when its parent is killed first.
    """
    gpus = visible_gpus()
    if not gpus:
        yield NO_GPU
        return
    waited = False
    while (taken := _first_free(gpus)) is None:
        if not waited:
            on_log(f"waiting for a free GPU among {', '.join(gpus)}")
        waited = True
        time.sleep(POLL_SECONDS)
    gpu, lock = taken
    try:
        yield Reservation({"CUDA_VISIBLE_DEVICES": gpu}, (lock,))
    finally:
        os.close(lock)


def visible_gpus() -> list[str]:
    """Return what `CUDA_VISIBLE_DEVICES` may name: its own entries if it is set, else the UUIDs of all GPUs."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip() not in ("", "-1", "NoDevFiles")]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip()]


def _first_free(gpus: list[str]) -> tuple[str, int] | None:
    for gpu in gpus:
        lock = _open_lock(Path(tempfile.gettempdir(), f"tamis-gpu-{gpu}.lock"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return gpu, lock
    return None


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)  # another user may have made it
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
