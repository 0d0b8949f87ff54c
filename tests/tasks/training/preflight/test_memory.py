"""A prediction against the device it has to fit."""

from dataclasses import dataclass

import psutil
import pytest
import torch

from tasks.training.preflight import memory
from tasks.training.preflight.memory import check_memory, free_memory

GIB = 2**30


@dataclass(frozen=True)
class Predicted:
    peak_bytes: int


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A card with 24 GiB, which the tests need not have."""

    class Card:
        total_memory = 24 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a small card")
    return torch.device("cuda:0")


def test_what_fits_passes(small_gpu: torch.device) -> None:
    [finding] = check_memory(Predicted(20 * GIB), small_gpu)
    assert (finding.status, finding.measured) == ("ok", "20.00 GiB")


def test_too_small_a_device_fails_and_says_what_to_lower(small_gpu: torch.device) -> None:
    [finding] = check_memory(Predicted(24 * GIB), small_gpu)
    assert finding.status == "failed"
    assert "at most 22.80 GiB (95% of 24.00 GiB a small card)" in finding.wanted
    assert "batch_size" in finding.remedy


def test_without_a_gpu_free_ram_is_the_limit() -> None:
    [fits] = check_memory(Predicted(1), torch.device("cpu"))
    [too_much] = check_memory(Predicted(psutil.virtual_memory().total + 1), torch.device("cpu"))
    assert (fits.status, too_much.status) == ("ok", "failed")
    assert "free RAM" in fits.wanted


def test_a_containers_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory() > 1000  # no such files: the machine's
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    assert free_memory() == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() > 5000
