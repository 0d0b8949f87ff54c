"""A prediction against the device it has to fit."""

from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest
import torch
from torch import nn

from tasks.training.memory.estimate import LOADING, NOTHING, Estimate, Workload
from tasks.training.model import Placement
from tasks.training.preflight import memory
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.memory import check_memory, free_memory, has_room_for_all, judge, largest_batch
from tasks.training.preflight.setup import Setup

GIB = 2**30


def judged(peak: int, device: torch.device) -> Finding:
    parts = dict.fromkeys(("adapters", "optimizer", "gradients", "activations", "working", "logits", "inputs"), 0)
    return judge(Estimate(weights=peak, **parts, moment="start"), Workload(4, 320), device)


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A card with 24 GiB, which the tests need not have."""

    class Card:
        total_memory = 24 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a small card")
    return torch.device("cuda:0")


def test_what_fits_passes(small_gpu: torch.device) -> None:
    finding = judged(20 * GIB, small_gpu)
    assert (finding.status, finding.subject) == ("ok", "4 samples of 320 tokens")
    assert "20.00 GiB at the start" in finding.measured


def test_too_small_a_device_fails_and_says_what_to_lower(small_gpu: torch.device) -> None:
    finding = judged(24 * GIB, small_gpu)
    assert finding.status == "failed"
    assert "at most 22.80 GiB (95% of 24.00 GiB a small card)" in finding.wanted
    assert "batch_size" in finding.remedy


def test_a_four_bit_model_too_large_to_load_says_that_sharing_it_does_not_help(small_gpu: torch.device) -> None:
    finding = judge(replace(NOTHING, weights=24 * GIB, moment=LOADING), Workload(4, 320), small_gpu)
    assert finding.status == "failed"
    assert "24.00 GiB at the loading, before it is shared: weights 24.00" in finding.measured
    assert "loads a 4-bit model whole before they share it: write quantization: none" in finding.remedy


def test_a_device_has_room_for_weights_and_for_gradients_of_what_is_trained(small_gpu: torch.device) -> None:
    placement = Placement(small_gpu, torch.bfloat16, four_bit=False)
    with torch.device("meta"):
        model = torch.nn.Linear(2**17, 2**15, bias=False)  # 8 GiB in bf16, and as much of gradients
    assert has_room_for_all(model, placement)
    assert has_room_for_all(nn.Sequential(model, other := frozen_gib(3)), placement)
    assert not has_room_for_all(nn.Sequential(model, other, frozen_gib(1)), placement)


def frozen_gib(count: int) -> nn.Module:
    return nn.Linear(2**14, count * 2**15, bias=False, device="meta").requires_grad_(False)


def test_what_is_predicted_is_the_least_where_the_training_decides_how_much_to_compute_again(
    shared_setup: Setup, small_gpu: torch.device
) -> None:
    setup = replace(shared_setup, placement=Placement(small_gpu, torch.bfloat16, four_bit=False))
    [left_to_it] = check_memory(setup)
    [chosen] = check_memory(replace(setup, recipe=setup.recipe.model_copy(update={"checkpointed_share": 1.0})))
    assert left_to_it.measured == chosen.measured + memory.FILLED


def test_without_a_gpu_free_ram_is_the_limit() -> None:
    fits = judged(1, torch.device("cpu"))
    too_much = judged(psutil.virtual_memory().total + 1, torch.device("cpu"))
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


def test_a_training_is_judged_by_its_longest_rows(shared_setup: Setup, own_setup: Callable[..., Setup]) -> None:
    workload = largest_batch(shared_setup)
    rows = [shared_setup.collator([dict(row)])["input_ids"].shape[1] for row in shared_setup.examples]
    assert (workload.batch, workload.sample_tokens, workload.images) == (2, max(rows), 1)
    [finding] = check_memory(shared_setup)
    assert finding.status == "ok"
    budget = replace(shared_setup, recipe=shared_setup.recipe.model_copy(update={"tokens_per_batch": 3 * max(rows)}))
    assert largest_batch(budget).batch == 3


def test_what_can_not_be_predicted_stops_no_training(shared_setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(shared_setup.processor), "_get_num_multimodal_tokens", None)
    [finding] = check_memory(replace(shared_setup))
    assert (finding.check, finding.status) == ("memory", "noted")
    assert "does not say how many tokens an image becomes" in finding.measured
