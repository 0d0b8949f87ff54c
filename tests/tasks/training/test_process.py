"""Children that hang, crash or fork; none imports torch."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tasks.training.process import ChildFailed, run_child

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
        pids.extend(map(int, line.split()[1:]))
        raise error

    with pytest.raises(error):
        run_child("hangs", {}, folder=tmp_path, on_log=cancel)
    assert len(pids) == 2
    assert wait_until_gone(pids)


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
