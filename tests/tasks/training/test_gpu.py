import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tasks.training import gpu
from tasks.training.gpu import NotEnoughGpus, reserved_gpus, visible_gpus


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu, "POLL_SECONDS", 0.05)


def test_two_runs_get_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    with reserved_gpus(print) as first, reserved_gpus(print) as second:
        assert first.environment == {"CUDA_VISIBLE_DEVICES": "GPU-a"}
        assert second.environment == {"CUDA_VISIBLE_DEVICES": "GPU-b"}


def test_a_gpu_is_free_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    for _ in range(2):
        with reserved_gpus(pytest.fail) as reservation:
            assert reservation.environment == {"CUDA_VISIBLE_DEVICES": "GPU-a"}


def test_a_third_run_waits_until_a_child_that_inherited_the_lock_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    with reserved_gpus(print) as reservation:
        sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
        child = subprocess.Popen(sleeper, pass_fds=reservation.locks)
    said: list[str] = []

    def kill_the_child(line: str) -> None:
        said.append(line)
        child.kill()
        child.wait()

    with reserved_gpus(kill_the_child):
        assert said == ["waiting for a free GPU among GPU-a"]


def test_several_gpus_are_held_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    with reserved_gpus(print, 2) as pair, reserved_gpus(print) as single:
        assert pair.environment == {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
        assert len(pair.locks) == 2
        assert single.environment == {"CUDA_VISIBLE_DEVICES": "GPU-c"}


def test_who_waits_for_several_gpus_holds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    said: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(reserved_gpus(pytest.fail))
        waiting = threading.Thread(target=lambda: hold_briefly(2, said))
        waiting.start()
        while not said:
            time.sleep(0.01)
        with reserved_gpus(pytest.fail) as other:  # the one left is free while the pair waits
            assert other.environment == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    waiting.join(timeout=20)
    assert said == ["waiting for 2 free GPUs among GPU-a, GPU-b", "held"]


def test_two_that_want_all_gpus_both_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    said: list[str] = []
    threads = [threading.Thread(target=lambda: hold_briefly(2, said)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert said.count("held") == 4


def hold_briefly(count: int, said: list[str]) -> None:
    with reserved_gpus(said.append, count):
        time.sleep(0.02)
        said.append("held")


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with (
        pytest.raises(NotEnoughGpus, match=r"gpus: 3 are asked for, but only 2 can be had \(GPU-a, GPU-b\)"),
        reserved_gpus(print, 3),
    ):
        pass


@pytest.mark.parametrize("value", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_not_used(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_gpus() == []
    with reserved_gpus(pytest.fail) as reservation:
        assert reservation.environment == {}


def test_all_gpus_are_listed_by_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho GPU-1111\necho GPU-2222\n")
    fake.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == ["GPU-1111", "GPU-2222"]


def test_a_machine_without_a_driver_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []
