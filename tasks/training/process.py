"""Runs a step that needs torch in a child process, so that its memory is freed and a crash stays contained.

The child never outlives its parent: it is killed with its whole group when the parent leaves, however it leaves.
"""

import ctypes
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tasks
from tasks.training.gpu import NO_GPU, Reservation

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
    gpu: Reservation = NO_GPU,
) -> dict[str, Any]:
    """Run `module.run(config, folder)` in a new process and return its result, a JSON object.

    `config` must be JSON too. Each line the child prints goes to `on_log` as it comes. Whatever ends this call,
    be it an exception of `on_log` or KeyboardInterrupt, the child and its own children are killed first. Raises
    `ChildFailed`.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / RESULT).unlink(missing_ok=True)
    command = [sys.executable, "-m", __name__, module, str(folder), str(os.getpid())]
    root = str(Path(tasks.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    started = time.monotonic()
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # its own pipe: an orphan must not keep the parent's output open
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, **gpu.environment},
        start_new_session=True,
        pass_fds=gpu.locks,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            on_log(line.rstrip())
        process.wait()
    finally:
        _kill_group(process)
    if process.returncode != 0 or not (folder / RESULT).exists():
        how = _describe_exit(process.returncode)
        lines = "\n".join(last) or "(it printed nothing)"
        raise ChildFailed(f"{module} {how} after {time.monotonic() - started:.0f} s. Last lines:\n{lines}")
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return result


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill the child and its children. Nothing is lost by not asking first: what it writes appears whole or not."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = ", perhaps because the machine ran out of memory," if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent goes (Linux); leave now if it went already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the parent process is gone")


def main() -> None:
    """Child side: `python -m tasks.training.process MODULE FOLDER PARENT_PID`."""
    module, folder, parent = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    _die_with_parent(parent)  # before the imports, which take seconds
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional CPU kernel is not installed
    config = json.loads((folder / "config.json").read_text())
    result = importlib.import_module(module).run(config, folder)
    unfinished = folder / f"{RESULT}.unfinished"
    unfinished.write_text(json.dumps(result))
    unfinished.replace(folder / RESULT)


if __name__ == "__main__":
    main()
