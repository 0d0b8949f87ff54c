"""Runs a step that needs torch in child processes, so that its memory is freed and a crash stays contained.

A child never outlives its parent: it is killed with its own children when the parent leaves, however it leaves.
"""

import ctypes
import importlib
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tasks
from tasks.training.gpu import NO_GPU, Reservation
from tasks.training.ranks import Ranks, is_first

LAST_LINES = 30
RESULT = "result.json"
_PR_SET_PDEATHSIG = 1

# Models are found before a child starts, so it needs no network; and its log is lines that a reader can act on.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUNBUFFERED": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while waiting stall each other when a CPU is shared
    "PYTHONWARNINGS": "ignore::FutureWarning",
}


class ChildFailed(RuntimeError):  # noqa: N818 - says what happened
    """A child process ended without a result; the message holds how it ended and the last lines it printed."""


def run_child(
    module: str,
    config: Mapping[str, Any],
    *,
    folder: Path,
    on_log: Callable[[str], None],
    gpus: Reservation = NO_GPU,
    processes: int = 1,
    restarts: int = 0,
) -> dict[str, Any]:
    """Run `module.run(config, folder)` in new processes and return the result of the first, a JSON object.

    `config` must be JSON too. Several processes find each other as torch.distributed's `env://` does. If a signal
    kills one, all are started again, `restarts` times at most. Each line they print goes to `on_log` as it comes.
    Whatever ends this call, be it an exception of `on_log` or KeyboardInterrupt, the processes and their own children
    are killed first. Raises `ChildFailed`.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / RESULT).unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, module, str(folder), str(os.getpid())]
    root = str(Path(tasks.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, **gpus.environment}
    started = time.monotonic()
    last: deque[str] = deque(maxlen=LAST_LINES)

    def say(line: str) -> None:
        last.append(line)
        on_log(line)

    while True:
        with Ranks(command, processes=processes, environment=environment, locks=gpus.locks) as ranks:
            for line in ranks.lines():
                say(line)
            failure = ranks.wait()
        if failure is None or not failure.killed or not restarts:
            break
        say(f"{failure}; all {processes} processes start again, {restarts} restarts are left")
        restarts -= 1
    if failure is None and (folder / RESULT).exists():
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
        return result
    seconds = time.monotonic() - started
    lines = "\n".join(last) or "(it printed nothing)"
    raise ChildFailed(f"{module}: {failure or 'no result was left'} after {seconds:.0f} s. Last lines:\n{lines}")


def _die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent goes (Linux); leave now if it went already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent process is gone")


def main() -> None:
    """Child side: `python -m tasks.training.process MODULE FOLDER [PARENT_PID]`, perhaps by `accelerate launch`."""
    module, folder = sys.argv[1], Path(sys.argv[2])
    _die_with_parent(int(sys.argv[3]) if len(sys.argv) > 3 else os.getppid())  # before the imports, which take seconds
    logging.basicConfig(level=logging.INFO if is_first() else logging.WARNING, stream=sys.stdout, format="%(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional CPU kernel is not installed
    config = json.loads((folder / "config.json").read_text())
    result = importlib.import_module(module).run(config, folder)
    if not is_first():
        return
    unfinished = folder / f"{RESULT}.unfinished"
    unfinished.write_text(json.dumps(result))
    unfinished.replace(folder / RESULT)


if __name__ == "__main__":
    main()
