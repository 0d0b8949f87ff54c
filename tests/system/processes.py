"""Processes of the system tests: started in groups of their own, waited for and ended."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Server:
    """A running Prefect server: where it listens, and the environment that makes a process use it."""

    url: str
    environment: dict[str, str]
    logs: Path

    def prefect(self, *arguments: str) -> str:
        """Run a `prefect` command from the repository's root and return what it printed."""
        command = [str(Path(sys.executable).parent / "prefect"), "--no-prompt", *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, *command: str, talking: bool = False) -> subprocess.Popen[bytes]:
        """Start a process in a group of its own, its output in the logs folder; or, if `talking`, only its errors."""
        log = (self.logs / f"{Path(command[0]).name}-{time.monotonic_ns()}.log").open("wb")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0} if talking else {}
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, start_new_session=True, **{"stdout": log, "stderr": log, **pipes}
        )


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def wait_until(happened: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.005)


def end(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGTERM) -> None:
    """Send a signal to the process's whole group and wait; SIGKILL if it does not heed another one."""
    os.killpg(process.pid, how)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
