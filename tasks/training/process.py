"""Runs a step that needs torch in a child process, so that its memory is freed and a crash stays contained.

The child never outlives its parent: it is killed with its whole group when the parent leaves, however it leaves. Only
where the parent is itself asked to leave does it ask the child first, and wait a while for what that wants to save.
"""

import ctypes
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import tasks
from tasks.training.child_side import REPORT, Stopped
from tasks.training.gpu import NO_GPU, Reservation

LAST_LINES = 30
RESULT = "result.json"
STOPPED = "stopped.json"
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
STOP_SECONDS = 120.0
"""How long a child has to end when its parent is asked to leave; clouds give notice of 30 to 120 s."""

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


class ChildStopped(ChildFailed):
    """A child process was asked to stop and did, ready to go on when it is run again; the message says from where."""


def run_child(
    module: str,
    config: Mapping[str, Any],
    *,
    folder: Path,
    on_log: Callable[[str], None],
    on_report: Callable[[dict[str, Any]], None] | None = None,
    gpu: Reservation = NO_GPU,
) -> dict[str, Any]:
    """Run `module.run(config, folder)` in a new process and return its result, a JSON object.

    `config` must be JSON too. Each line the child prints goes to `on_log` as it comes, and each of its `report`s to
    `on_report`. Whatever ends this call, the child and its own children are killed first: at once if `on_log` or
    `on_report` fails, but if this process is asked to leave (SIGTERM, KeyboardInterrupt, anything that is not an
    `Exception`), the child is sent SIGTERM and has `STOP_SECONDS` to end by itself. Raises `ChildFailed`, or
    `ChildStopped` if the child raised `Stopped`.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for outcome in (RESULT, STOPPED):
        (folder / outcome).unlink(missing_ok=True)
    started = time.monotonic()
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = _start(module, folder, gpu)

    def follow() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(REPORT):
                if on_report:
                    on_report(json.loads(line.removeprefix(REPORT)))
                continue
            last.append(line.rstrip())
            on_log(line.rstrip())
        process.wait()

    try:
        with _sigterm_raising():
            follow()
    except Exception:
        raise
    except BaseException:  # this process is asked to leave
        _stop(process, follow)
        raise
    finally:
        _kill_group(process)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    if (folder / STOPPED).exists():
        raise ChildStopped(json.loads((folder / STOPPED).read_text()))
    if process.returncode != 0 or not (folder / RESULT).exists():
        how = _describe_exit(process.returncode)
        lines = "\n".join(last) or "(it printed nothing)"
        raise ChildFailed(f"{module} {how} after {time.monotonic() - started:.0f} s. Last lines:\n{lines}")
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return result


def _start(module: str, folder: Path, gpu: Reservation) -> "subprocess.Popen[str]":
    root = str(Path(tasks.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, module, str(folder), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,  # its own pipe: an orphan must not keep the parent's output open
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, **gpu.environment},
        start_new_session=True,
        pass_fds=gpu.locks,
    )
    threading.Thread(target=_end_group_of, args=[process], daemon=True).start()
    return process


@contextmanager
def _sigterm_raising() -> Iterator[None]:
    """Make a SIGTERM that would end this process on the spot raise SystemExit; one that is handled stays as it is."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(process: "subprocess.Popen[str]", follow: Callable[[], None]) -> None:
    """Ask the child to stop and follow what it still says; it is killed when its time is over."""
    late = threading.Timer(STOP_SECONDS, _kill_group, [process])
    late.daemon = True
    late.start()
    try:
        process.terminate()
        follow()
    finally:
        late.cancel()


def _end_group_of(process: "subprocess.Popen[str]") -> None:
    """Wait for the child and kill what it leaves behind: that could hold its output open, and the parent reads on."""
    with suppress(ChildProcessError):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not reaped yet, so that its number stays its own
        _kill_group(process)


def _kill_group(process: "subprocess.Popen[str]") -> None:
    """Kill the child and its children, even those it left behind. What it was writing appears whole or not at all."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


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
    signal.signal(signal.SIGTERM, _stop_now)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional CPU kernel is not installed
    try:
        config = json.loads((folder / "config.json").read_text())
        _write(folder / RESULT, importlib.import_module(module).run(config, folder))
    except Stopped as stopped:
        logging.getLogger(__name__).info("%s", stopped)
        _write(folder / STOPPED, str(stopped))
        sys.exit(EXIT_STOPPED)


def _stop_now(*_: object) -> None:
    """What SIGTERM does in a child that does not handle it otherwise."""
    raise Stopped("stopped; run it again to go on")


def _write(path: Path, value: Any) -> None:
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(path)


if __name__ == "__main__":
    main()
