"""Several processes as one: what they are told, what is heard of them, and that none is left. None imports torch."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tasks.training.process import STOPPED, ChildFailed, ChildStopped, run_child
from tests.tasks.training.test_process import wait_until_gone

CHILDREN = {
    "tells": """
import os
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
def run(config, folder):
    print(*(os.environ.get(name) for name in NAMES))
    return {"rank": os.environ.get("RANK"), "port": os.environ.get("MASTER_PORT")}
""",
    "one_dies": """
import os, signal, time
def run(config, folder):
    print("pid", os.getpid(), flush=True)
    while not all((folder / f"{rank}").exists() for rank in "012"):
        (folder / os.environ["RANK"]).touch()
        time.sleep(0.01)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["RANK"] == "0":
        raise RuntimeError("connection closed by peer")
    time.sleep(600)
""",
    "dies_twice": """
import os, signal
def run(config, folder):
    died = len(list(folder.glob("died-*")))
    if os.environ["RANK"] == "1" and died < 2:
        (folder / f"died-{died}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"died": died}
""",
    "asks": """
import os
from tasks.training.child_side import StartAgain
def run(config, folder):
    tried = len(list(folder.glob("tried-*")))
    if os.environ["RANK"] == "1" and not tried:
        (folder / "tried-0").touch()
        raise StartAgain("memory is short")
    return {"tried": tried}
""",
    "raises": """
import os
def run(config, folder):
    (folder / f"tried-{os.getpid()}").touch()
    raise ValueError("always")
""",
    "stops": """
import time
def run(config, folder):
    print("up", flush=True)
    time.sleep(600)
""",
    "hangs": """
import os, subprocess, sys, time
def run(config, folder):
    grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("pids", os.getpid(), grandchild.pid)
    time.sleep(600)
""",
}


@pytest.fixture(autouse=True)
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    for name, source in CHILDREN.items():
        (modules / f"{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(modules))


def silent(line: str) -> None:
    """Take a line and do nothing."""


def test_each_process_is_told_its_place_and_lines_of_others_are_marked(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_child("tells", {}, folder=tmp_path, on_log=lines.append, processes=2)
    assert result["rank"] == "0"
    assert int(result["port"]) > 0
    assert sorted(lines) == ["0 0 2 2 127.0.0.1", "rank 1: 1 1 2 2 127.0.0.1"]


def test_a_single_process_is_told_of_no_others(tmp_path: Path) -> None:
    lines: list[str] = []
    assert run_child("tells", {}, folder=tmp_path, on_log=lines.append) == {"rank": None, "port": None}
    assert lines == ["None None None None None"]


def test_the_killed_process_is_blamed_and_the_others_end(tmp_path: Path) -> None:
    pids: list[int] = []
    with pytest.raises(ChildFailed, match="rank 1 was killed by SIGKILL") as caught:
        run_child("one_dies", {}, folder=tmp_path, on_log=lambda line: pids.extend(find_pids(line)), processes=3)
    assert "connection closed by peer" in str(caught.value)
    assert len(pids) == 3
    assert wait_until_gone(pids)


def test_a_group_of_which_one_was_killed_starts_again(tmp_path: Path) -> None:
    lines: list[str] = []
    result = run_child("dies_twice", {}, folder=tmp_path, on_log=lines.append, processes=2, restarts=2)
    assert result == {"died": 2}
    assert [line.rpartition("; ")[2] for line in lines] == [
        "all 2 processes start again, 2 restarts are left",
        "all 2 processes start again, 1 restarts are left",
    ]


def test_a_group_of_which_one_asks_for_it_starts_again(tmp_path: Path) -> None:
    lines: list[str] = []
    assert run_child("asks", {}, folder=tmp_path, on_log=lines.append, processes=2, restarts=1) == {"tried": 1}
    assert lines == [
        "rank 1: memory is short",
        "rank 1 could not go on; all 2 processes start again, 1 restarts are left",
    ]


def test_who_asks_for_it_uses_up_no_restart(tmp_path: Path) -> None:
    assert run_child("asks", {}, folder=tmp_path, on_log=silent, processes=2, restarts=0) == {"tried": 1}


def test_restarts_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="rank 1 was killed by SIGKILL"):
        run_child("dies_twice", {}, folder=tmp_path, on_log=silent, processes=2, restarts=1)
    assert len(list(tmp_path.glob("died-*"))) == 2


def test_an_exception_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="ended with exit code 1"):
        run_child("raises", {}, folder=tmp_path, on_log=silent, processes=2, restarts=3)
    assert len(list(tmp_path.glob("tried-*"))) <= 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_the_call_kills_all_and_their_children(tmp_path: Path, error: type[BaseException]) -> None:
    pids: list[int] = []

    def cancel(line: str) -> None:
        pids.extend(find_pids(line))
        if len(pids) == 4:
            raise error

    with pytest.raises(error):
        run_child("hangs", {}, folder=tmp_path, on_log=cancel, processes=2)
    assert wait_until_gone(pids)


def test_all_die_with_a_killed_parent(tmp_path: Path) -> None:
    source = (
        "from pathlib import Path; from tasks.training.process import run_child; "
        f"run_child('hangs', {{}}, folder=Path({str(tmp_path)!r}), on_log=lambda line: print(line, flush=True), "
        "processes=2)"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert parent.stdout is not None
    (first, left), (second, over) = (find_pids(parent.stdout.readline()) for _ in range(2))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert wait_until_gone([first, second])
    finally:
        parent.stdout.close()
        for grandchild in (left, over):
            os.kill(grandchild, signal.SIGKILL)


def test_all_are_asked_to_stop_before_they_are_killed(tmp_path: Path) -> None:
    lines: list[str] = []

    def leave(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child("stops", {}, folder=tmp_path, on_log=leave, processes=2)
    assert sorted(lines[:2]) == ["rank 1: up", "up"]
    assert (tmp_path / STOPPED).exists()


def test_one_that_is_asked_to_stop_is_not_started_again(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        for child in psutil.Process().children():
            child.terminate()

    with pytest.raises(ChildStopped, match="stopped; run it again to go on"):
        run_child("stops", {}, folder=tmp_path, on_log=stop, processes=2, restarts=3)


def test_only_the_first_process_leaves_a_result(tmp_path: Path) -> None:
    run_child("tells", {}, folder=tmp_path, on_log=silent, processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "modules", "result.json"]


def test_processes_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 9)
    (tmp_path / "modules" / "threads.py").write_text(
        "import os\ndef run(config, folder):\n    return {'threads': os.environ['OMP_NUM_THREADS']}\n"
    )
    assert run_child("threads", {}, folder=tmp_path, on_log=silent, processes=2) == {"threads": "4"}


def find_pids(line: str) -> list[int]:
    return [int(word) for word in line.split() if word.isdigit()]
