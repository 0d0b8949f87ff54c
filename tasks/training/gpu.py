"""Keeps two trainings off the same GPU with a file lock that the kernel releases when its holders are gone."""

import fcntl
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

POLL_SECONDS = 5.0


class NotEnoughGpus(RuntimeError):  # noqa: N818 - says what is the matter
    """More GPUs were asked for than there are; the message says how many can be had."""


@dataclass(frozen=True)
class Reservation:
    """What child processes need to use the reserved devices: environment variables, and locks they must keep open."""

    environment: Mapping[str, str] = field(default_factory=dict)
    locks: tuple[int, ...] = ()


NO_GPU = Reservation()


@contextmanager
def reserved_gpus(on_log: Callable[[str], None], count: int = 1) -> Iterator[Reservation]:
    """Wait until `count` of this machine's visible GPUs are free and hold them; without GPUs, reserve nothing.

    All are taken at once: who waits for several holds none meanwhile. Children that inherit the locks keep the GPUs
    reserved even when their parent is killed first. Raises `NotEnoughGpus`.
    """
    gpus = visible_gpus()
    if not gpus:
        yield NO_GPU
        return
    if count > len(gpus):
        names = ", ".join(gpus)
        raise NotEnoughGpus(f"gpus: {count} are asked for, but only {len(gpus)} can be had ({names}). Write fewer.")
    waited = False
    while not (taken := _take(count, gpus)):
        if not waited:
            on_log(f"waiting for {'a free GPU' if count == 1 else f'{count} free GPUs'} among {', '.join(gpus)}")
        waited = True
        time.sleep(POLL_SECONDS)
    try:
        yield Reservation({"CUDA_VISIBLE_DEVICES": ",".join(taken)}, tuple(taken.values()))
    finally:
        _release(taken.values())


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


def _take(count: int, gpus: list[str]) -> dict[str, int]:
    """Lock `count` free GPUs and return the locks by GPU; empty, with nothing locked, if so many are not free."""
    choosing = _open_lock("tamis-gpus.lock")
    try:
        fcntl.flock(choosing, fcntl.LOCK_EX)  # else two that want all GPUs could take half each, again and again
        taken: dict[str, int] = {}
        for gpu in gpus:
            lock = _open_lock(f"tamis-gpu-{gpu}.lock")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _release([lock])
                continue
            taken[gpu] = lock
            if len(taken) == count:
                return taken
        _release(taken.values())
        return {}
    finally:
        _release([choosing])


def _release(locks: Iterable[int]) -> None:
    for lock in locks:
        os.close(lock)


def _open_lock(name: str) -> int:
    path = Path(tempfile.gettempdir(), name)
    try:
        return os.open(path, os.O_RDONLY)  # another user may have made it
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
