"""Cutting batches into pieces: evenly, in order, and known to the data loader's workers."""

import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.training.out_of_memory import CutCollator, Pieces, is_out_of_memory


def rows(count: int) -> list[dict[str, Any]]:
    return [{"sample_id": str(at)} for at in range(count)]


def sizes(pieces: Pieces, count: int) -> list[int]:
    return [len(piece) for piece in pieces.cut(rows(count))]


def test_batches_are_halved_each_time(tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "events", device="a")
    assert sizes(pieces, 8) == [8]
    pieces.double(step=1, samples=8)
    assert sizes(pieces, 8) == [4, 4]
    pieces.double(step=1, samples=4)
    assert sizes(pieces, 8) == [2, 2, 2, 2]


@pytest.mark.parametrize("count", range(1, 12))
def test_no_sample_is_lost_or_moved_and_no_piece_is_empty(count: int, tmp_path: Path) -> None:
    pieces = Pieces(tmp_path / "events", device="a")
    for _ in range(3):
        pieces.double(step=1, samples=1)
    cut = pieces.cut(rows(count))
    assert [row for piece in cut for row in piece] == rows(count)
    lengths = {len(piece) for piece in cut}
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1


def test_a_log_line_says_what_happened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Pieces(tmp_path / "events", device="a").double(step=7, samples=4)
    [record] = caplog.records
    assert record.getMessage().startswith(
        "out of memory in step 7 with 4 samples at once: every batch is computed in 2 pieces from here on."
    )


def test_what_did_not_fit_is_remembered_for_the_same_device_only(tmp_path: Path) -> None:
    Pieces(tmp_path / "events", device="small").double(step=1, samples=4)
    assert Pieces(tmp_path / "events", device="small").count == 2
    assert Pieces(tmp_path / "events", device="large").count == 1


def collate_in_worker(collate: CutCollator, go: Any, answers: Any) -> None:
    go.wait()
    answers.put(collate(rows(4))["sample_ids"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_cut_smaller_too(method: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context(method)
    pieces = Pieces(tmp_path / "events", device="a")
    go, answers = context.Event(), context.SimpleQueue()
    worker = context.Process(target=collate_in_worker, args=(CutCollator(len, pieces), go, answers))  # type: ignore[arg-type]
    worker.start()
    pieces.double(step=1, samples=4)
    go.set()
    assert answers.get() == [["0", "1"], ["2", "3"]]
    worker.join()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_where_gpus_differ_each_kind_goes_on_with_its_own_pieces(tmp_path: Path) -> None:
    large, small = (Pieces(tmp_path / "events", device=device) for device in ("large", "small"))
    for _ in range(2):
        small.double(step=1, samples=4)
    large.double(step=2, samples=8)
    assert [Pieces(tmp_path / "events", device=device).count for device in ("large", "small")] == [2, 4]
