"""Runs a step that needs torch in a child process, so that its memory is freed and a crash stays contained.

The child never outlives its parent: it is killed with its whole group when the parent leaves, however it leaves. Only
where the parent is itself asked to leave does it ask the child first, and wait a while for what that wants to save.
"""

import ctypes
import gc
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import tasks
from tasks.training.child_side import REPORT, StartAgain, Stopped
from tasks.training.gpu import NO_GPU, Reservation
from tasks.training.ranks import EXIT_AGAIN, EXIT_STOPPED, Failure, Ranks, is_first

LAST_LINES = 30
RESULT = "result.json"
STOPPED = "stopped.json"
STOP_SECONDS = 120.0
"""How long children have to end when their parent is asked to leave; clouds give notice of 30 to 120 s."""

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
    gpus: Reservation = NO_GPU,
    processes: int = 1,
    restarts: int = 0,
) -> dict[str, Any]:
    """Run `module.run(config, folder)` in new processes and return the result of the first, a JSON object.

    `config` must be JSON too. Several processes find each other as torch.distributed's `env://` does. If a signal
    kills one, all are started again, `restarts` times at most, and whenever one raises `StartAgain`. Each line goes to
    `on_log` as it comes, and each of the first one's `report`s to `on_report`. Whatever ends this call, the processes
    and their own children are killed first: at once if `on_log` or `on_report` fails, but if this process is asked to
    leave (SIGTERM, KeyboardInterrupt, anything that is not an `Exception`), they are sent SIGTERM and have
    `STOP_SECONDS` to end by themselves. Raises `ChildFailed`, or `ChildStopped` if they raised `Stopped`.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for outcome in (RESULT, STOPPED):
        (folder / outcome).unlink(missing_ok=True)
    started = time.monotonic()
    last: deque[str] = deque(maxlen=LAST_LINES)

    def say(line: str) -> None:
        if line.startswith(REPORT):
            if on_report:
                on_report(json.loads(line.removeprefix(REPORT)))
            return
        last.append(line)
        on_log(line)

    while True:
        failure = _run_once(module, folder, gpus, processes=processes, say=say)
        if failure is None or not failure.may_pass or not (failure.asks or restarts):
            break
        say(f"{failure}; all {processes} processes start again, {restarts} restarts are left")
        restarts -= not failure.asks
    if (folder / STOPPED).exists():
        raise ChildStopped(json.loads((folder / STOPPED).read_text()))
    if failure is None and (folder / RESULT).exists():
        result: dict[str, Any] = json.loads((folder / RESULT).read_text())
        return result
    seconds = time.monotonic() - started
    lines = "\n".join(last) or "(it printed nothing)"
    raise ChildFailed(f"{module}: {failure or 'no result was left'} after {seconds:.0f} s. Last lines:\n{lines}")


def _run_once(
    module: str, folder: Path, gpus: Reservation, *, processes: int, say: Callable[[str], None]
) -> Failure | None:
    """Start the processes and follow them until all have ended; return how they failed, if they did."""
    command = [sys.executable, "-m", __name__, module, str(folder), str(os.getpid())]
    root = str(Path(tasks.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, **gpus.environment}
    with Ranks(command, processes=processes, environment=environment, locks=gpus.locks) as ranks:
        try:
            with _sigterm_raising():
                for line in ranks.lines():
                    say(line)
        except Exception:
            raise
        except BaseException:  # this process is asked to leave
            ranks.terminate(kill_after=STOP_SECONDS)
            for line in ranks.lines():
                say(line)
            raise
        return ranks.wait()


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
    signal.signal(signal.SIGTERM, _stop_now)
    logging.basicConfig(level=logging.INFO if is_first() else logging.WARNING, stream=sys.stdout, format="%(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that an optional CPU kernel is not installed
    try:
        config = json.loads((folder / "config.json").read_text())
        _write(folder / RESULT, _imported(module).run(config, folder))
    except Stopped as stopped:
        logging.getLogger(__name__).info("%s", stopped)
        _write(folder / STOPPED, str(stopped))
        _leave(EXIT_STOPPED)
    except StartAgain as error:
        logging.getLogger(__name__).warning("%s", error)
        _leave(EXIT_AGAIN)
    except Exception:
        traceback.print_exc()
        _leave(1)
    _leave(0)


def _imported(module: str) -> Any:
    """Import a module that imports torch; looking for garbage meanwhile takes a fifth of the time and finds none."""
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()  # what imports made stays
        gc.enable()


def _leave(status: int) -> NoReturn:
    """End this process, which has said and written all, without taking torch's modules apart: that takes seconds."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _stop_now(*_: object) -> None:
    """What SIGTERM does in a child that does not handle it otherwise."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked once more, it would not get to say that it stopped
    raise Stopped("stopped; run it again to go on")


def _write(path: Path, value: Any) -> None:
    if not is_first():
        return
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(value))
    unfinished.replace(path)


if __name__ == "__main__":
    main()
