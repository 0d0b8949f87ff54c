"""Children that hang, crash or fork; none imports torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.training.process import EXIT_STOPPED, ChildFailed, ChildStopped, run_child

CHILDREN = {
    "doubles": """
def run(config, folder):
    print("doubling", config["number"])
    return {"double": 2 * config["number"]}
""",
    "raises": """
def run(config, folder):
    print("about to fail")
    raise ValueError("the weights are missing")
""",
    "dies": """
import os, signal
def run(config, folder):
    os.kill(os.getpid(), signal.SIGKILL)
""",
    "hangs": """
import os, subprocess, sys, time
def run(config, folder):
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("pids", os.getpid(), grandchild.pid)
    time.sleep(600)
""",
    "saves": """
import os, signal, time
from tasks.training.child_side import Stopped
def run(config, folder):
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    print("pids", os.getpid(), flush=True)
    while not asked:
        time.sleep(0.01)
    (folder / "saved").touch()
    print("saved")
    raise Stopped("stopped after step 3")
""",
    "deaf": """
import os, signal, time
def run(config, folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("pids", os.getpid(), flush=True)
    time.sleep(600)
""",
    "reports": """
from tasks.training.child_side import report
def run(config, folder):
    print("before")
    report({"step": 1})
    print("after")
    return {}
""",
    "telemetry": """
import os
def run(config, folder):
    return {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")}
""",
}


@pytest.fixture(autouse=True)
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    for name, source in CHILDREN.items():
        (modules / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(modules))


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pids_in(line: str) -> list[int]:
    return list(map(int, line.split()[1:])) if line.startswith("pids") else []


def terminate_child(line: str) -> None:
    for pid in pids_in(line)[:1]:
        os.kill(pid, signal.SIGTERM)


def wait_until_gone(pids: list[int], seconds: float = 5) -> bool:
    end = time.monotonic() + seconds
    while not all(map(is_gone, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return all(map(is_gone, pids))


def test_the_result_comes_back_and_lines_are_streamed(tmp_path: Path) -> None:
    lines: list[str] = []
    assert run_child("doubles", {"number": 21}, folder=tmp_path, on_log=lines.append) == {"double": 42}
    assert lines == ["doubling 21"]


def test_a_failure_carries_the_last_lines(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed) as caught:
        run_child("raises", {}, folder=tmp_path, on_log=lambda line: None)
    assert "ended with exit code 1" in str(caught.value)
    assert "about to fail" in str(caught.value)
    assert str(caught.value).endswith("ValueError: the weights are missing")


def test_a_kill_is_told_from_a_crash(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="was killed by SIGKILL, perhaps because the machine ran out of memory"):
        run_child("dies", {}, folder=tmp_path, on_log=lambda line: None)


def test_an_earlier_result_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    run_child("doubles", {"number": 1}, folder=tmp_path, on_log=lambda line: None)
    with pytest.raises(ChildFailed):
        run_child("dies", {}, folder=tmp_path, on_log=lambda line: None)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_the_call_kills_the_child_and_its_children(tmp_path: Path, error: type[BaseException]) -> None:
    pids: list[int] = []

    def cancel(line: str) -> None:
        pids.extend(pids_in(line))
        raise error

    with pytest.raises(error):
        run_child("hangs", {}, folder=tmp_path, on_log=cancel)
    assert len(pids) == 2
    assert wait_until_gone(pids)


def test_a_child_that_is_asked_to_stop_says_where_it_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ChildStopped, match=r"^stopped after step 3$"):
        run_child("saves", {}, folder=tmp_path, on_log=terminate_child)
    assert (tmp_path / "saved").exists()


def test_a_child_with_nothing_to_save_stops_when_asked(tmp_path: Path) -> None:
    with pytest.raises(ChildStopped, match="run it again"):
        run_child("hangs", {}, folder=tmp_path, on_log=terminate_child)


def test_an_earlier_stop_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    with pytest.raises(ChildStopped):
        run_child("saves", {}, folder=tmp_path, on_log=terminate_child)
    assert run_child("doubles", {"number": 1}, folder=tmp_path, on_log=lambda line: None) == {"double": 2}


def test_a_parent_that_is_asked_to_leave_lets_the_child_save(tmp_path: Path) -> None:
    lines: list[str] = []

    def leave(line: str) -> None:
        lines.append(line)
        if line.startswith("pids"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("saves", {}, folder=tmp_path, on_log=leave)
    assert (tmp_path / "saved").exists()
    assert lines[1:] == ["saved", "stopped after step 3"]


def test_a_parent_that_fails_kills_at_once(tmp_path: Path) -> None:
    def fail(line: str) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run_child("saves", {}, folder=tmp_path, on_log=fail)
    assert not (tmp_path / "saved").exists()


def test_a_child_that_does_not_stop_is_killed_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.process.STOP_SECONDS", 0.2)
    pids: list[int] = []

    def leave(line: str) -> None:
        pids.extend(pids_in(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("deaf", {}, folder=tmp_path, on_log=leave)
    assert wait_until_gone(pids)


def test_a_terminated_parent_lets_the_child_save_and_ends(tmp_path: Path) -> None:
    source = (
        "from pathlib import Path; from tasks.training.process import run_child; "
        f"run_child('saves', {{}}, folder=Path({str(tmp_path)!r}), on_log=lambda line: print(line, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert parent.stdout is not None
    assert parent.stdout.readline().startswith("pids")
    parent.terminate()
    said, _ = parent.communicate(timeout=20)
    assert said.splitlines() == ["saved", "stopped after step 3"]
    assert parent.returncode == 128 + signal.SIGTERM
    assert (tmp_path / "saved").exists()


def test_a_stopped_child_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "tasks.training.process", "saves", str(tmp_path), str(os.getpid())]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert child.stdout is not None
    terminate_child(child.stdout.readline())
    child.communicate(timeout=20)
    assert child.returncode == EXIT_STOPPED == os.EX_TEMPFAIL


def test_reports_are_told_from_the_log(tmp_path: Path) -> None:
    lines: list[str] = []
    reports: list[dict[str, object]] = []
    run_child("reports", {}, folder=tmp_path, on_log=lines.append, on_report=reports.append)
    assert (lines, reports) == (["before", "after"], [{"step": 1}])


def test_the_child_dies_with_a_killed_parent(tmp_path: Path) -> None:
    source = (
        "from pathlib import Path; from tasks.training.process import run_child; "
        f"run_child('hangs', {{}}, folder=Path({str(tmp_path)!r}), on_log=lambda line: print(line, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert parent.stdout is not None
    child, grandchild = map(int, parent.stdout.readline().split()[1:])
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert wait_until_gone([child])
    finally:
        parent.stdout.close()
        os.kill(grandchild, signal.SIGKILL)


def test_children_neither_use_the_network_nor_report_use(tmp_path: Path) -> None:
    seen = run_child("telemetry", {}, folder=tmp_path, on_log=lambda line: None)
    assert seen == {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
