"""Starts the processes of one training, one a GPU, as a group of which none outlives another's failure.

Each gets the variables that torchrun and `accelerate launch` would give it, so those can start it just as well.
"""

import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

POLL_SECONDS = 0.2
# When one process is killed the others fail for want of it: how long to wait for what else happened.
LAST_WORDS_SECONDS = 1.0
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
EXIT_AGAIN = 71  # EX_OSERR: something was short, start all again


@dataclass(frozen=True)
class Failure:
    """How a process ended without success: its exit code (negative: the signal), and its rank if it is one of many."""

    rank: int | None
    code: int

    @property
    def asks(self) -> bool:
        """Whether it asks that all are started again, because that will help."""
        return self.code == EXIT_AGAIN

    @property
    def may_pass(self) -> bool:
        """Whether starting again may help: a signal ended it, or it asks for that; an exception would come again."""
        return self.code < 0 or self.asks

    def __str__(self) -> str:
        who = "the process" if self.rank is None else f"rank {self.rank}"
        if self.code == EXIT_AGAIN:
            return f"{who} could not go on"
        if self.code > 0:
            return f"{who} ended with exit code {self.code}"
        hint = ", perhaps because the machine ran out of memory," if self.code == -signal.SIGKILL else ""
        return f"{who} was killed by {signal.Signals(-self.code).name}{hint}"


class Ranks:
    """A group of running processes. Leaving its `with` block kills all that are left, and their children.

    Lines printed by any but rank 0 begin with their rank. Each process is the leader of a session of its own.
    """

    def __init__(
        self, command: Sequence[str], *, processes: int, environment: Mapping[str, str], locks: Sequence[int]
    ) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._failure: Failure | None = None
        self._late: threading.Timer | None = None
        port = free_port() if processes > 1 else 0
        try:
            for rank in range(processes):
                place = variables(rank, processes, port) if processes > 1 else {}
                self._start(command, environment={**environment, **place}, locks=locks)
        except BaseException:
            self.kill()
            raise

    def _start(self, command: Sequence[str], *, environment: Mapping[str, str], locks: Sequence[int]) -> None:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # its own pipe: an orphan must not keep the parent's output open
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
            pass_fds=tuple(locks),
        )
        prefix = f"rank {len(self._processes)}: " if self._processes else ""
        self._processes.append(process)
        threading.Thread(target=self._read, args=(process, prefix), daemon=True).start()
        threading.Thread(target=_reap, args=(process,), daemon=True).start()

    def _read(self, process: "subprocess.Popen[str]", prefix: str) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._lines.put(prefix + line.rstrip())
        self._lines.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def lines(self) -> Iterator[str]:
        """Yield what the processes print, as it comes, until all have ended. When one fails the others are killed."""
        reading = len(self._processes)
        while reading:
            self._stop_if_failed()
            try:
                line = self._lines.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue
            if line is None:
                reading -= 1
            else:
                yield line

    def wait(self) -> Failure | None:
        """Wait until all have ended; return the failure that brought the group down, if one did."""
        for process in self._processes:
            process.wait()
        self._stop_if_failed()
        return self._failure

    def terminate(self, *, kill_after: float) -> None:
        """Ask all to end, and kill those that are left after so many seconds; `lines` tells what they still say."""
        for process in self._processes:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
        self._late = threading.Timer(kill_after, self._kill_groups)
        self._late.daemon = True
        self._late.start()

    def kill(self) -> None:
        """Kill what is left of the group."""
        if self._late:
            self._late.cancel()
        self._kill_groups()
        for process in self._processes:
            process.wait()

    def _kill_groups(self) -> None:
        for process in self._processes:
            _kill_group(process)

    def _stop_if_failed(self) -> None:
        if self._failure or not self._failures():
            return
        if any(process.returncode is None for process in self._processes):
            time.sleep(LAST_WORDS_SECONDS)
        self._failure = max(self._failures(), key=lambda failure: failure.may_pass)
        self.kill()

    def _failures(self) -> list[Failure]:
        codes = [process.returncode for process in self._processes]  # `_reap` sets them
        several = len(codes) > 1
        failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0, EXIT_STOPPED)]
        return [Failure(rank if several else None, code) for rank, code in failed]


def _reap(process: "subprocess.Popen[str]") -> None:
    """Wait for a process and kill what it leaves behind: that could hold its output open, and the parent reads on."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped yet, so that its number stays its own
        _kill_group(process)
    process.wait()


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill a process and its children. What it was writing appears whole or not at all."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def world_size() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number among those of its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return rank() == 0


def variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """Return what torch.distributed's `env://` and accelerate read, for processes that all run on this machine."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port
