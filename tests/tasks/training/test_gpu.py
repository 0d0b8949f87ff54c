import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tasks.training import gpu
from tasks.training.gpu import reserved_gpus, visible_gpus


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
