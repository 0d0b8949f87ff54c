"""What a step learns does not depend on how it is cut, nor on running out of memory on the way."""

import json
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl.trainer.sft_trainer import SFTTrainer

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.child_side import StartAgain
from tasks.training.collate import IGNORED
from tasks.training.conversations import make_collator
from tasks.training.dataset import read_examples, write_examples
from tasks.training.divergence import Diverged, recall
from tasks.training.out_of_memory import OUT_OF_MEMORY, OutOfMemory, Pieces
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids
from tasks.training.trainer import Trainer
from tests.tasks.training.in_process import (
    LEARNED,
    Disturb,
    FailsInBackward,
    GradientsExplode,
    Interrupted,
    Poisons,
    RoomFor,
    Training,
    each,
    raise_out_of_memory,
    train_here,
)

STEPS, BATCH, ACCUMULATION = 3, 4, 2


@pytest.fixture(scope="module")
def examples(
    squares: tuple[Warehouse, SnapshotRef], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> Dataset:
    """The 13 training rows, with answers of different lengths, so that means of means are no means."""
    warehouse, snapshot = squares
    longer = recipe.model_copy(update={"completion": "if(key < '2', caption, metadata ->> 'answer')"})
    path = tmp_path_factory.mktemp("examples") / "examples.arrow"
    return read_examples(write_examples(snapshot, longer, split="train", warehouse=warehouse, path=path).path)


@pytest.fixture(scope="module")
def still(recipe: Recipe) -> Recipe:
    """Steps of 8, 5 and 8 samples; no dropout, whose places depend on how a step is cut."""
    changes = {"lora_dropout": 0.0, "warmup": 0.0, "checkpointed_share": 0.0}
    sizes = {"batch_size": BATCH, "accumulation": ACCUMULATION, "max_steps": STEPS}
    return recipe.model_copy(update={**changes, **sizes})


@pytest.fixture(scope="module")
def undisturbed(still: Recipe, examples: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Training:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return train_here(still, examples, tmp_path_factory.mktemp("undisturbed"), monkeypatch=monkeypatch)


@pytest.fixture(scope="module")
def disturbed(still: Recipe, examples: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Ran out of memory once, in the backward pass of the second batch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("disturbed")
        return train_here(still, examples, folder, disturb=FailsInBackward(2), monkeypatch=monkeypatch)


def assert_same(found: Training, expected: Training) -> None:
    """The same samples in the same order in each step, the same figures and the same adapter up to rounding."""
    assert [line["samples"] for line in found.metrics] == [line["samples"] for line in expected.metrics]
    for line, wanted in zip(found.metrics, expected.metrics, strict=True):
        assert {name: line[name] for name in LEARNED} == pytest.approx(
            {name: wanted[name] for name in LEARNED}, rel=2e-4
        )
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-3, atol=2e-5)


def test_the_loss_is_the_mean_over_the_steps_supervised_tokens(
    undisturbed: Training, still: Recipe, examples: Dataset
) -> None:
    processor = models.load_processor(still.base_model, still)
    model = models.load_model(still.base_model, models.place(still)).eval()
    collator = make_collator(processor, examples, stop_ids(model))
    rows = {row["sample_id"]: row for row in examples}
    sums, counts = [], []
    for ids in undisturbed.passes[:ACCUMULATION]:
        for sample in ids:
            batch = dict(collator([rows[sample]]))
            labels = batch.pop("labels")[0, 1:]
            with torch.no_grad():
                logits = model(**batch).logits[0, :-1]
            sums.append(float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")))
            counts.append(int((labels != IGNORED).sum()))
    assert sum(counts[:BATCH]) != sum(counts[BATCH:])  # else the mean of the batches' means would be the same
    assert undisturbed.metrics[0]["loss"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)


def test_accumulation_changes_nothing(
    still: Recipe, examples: Dataset, undisturbed: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = still.model_copy(update={"batch_size": 1, "accumulation": BATCH * ACCUMULATION})
    found = train_here(narrow, examples, tmp_path, monkeypatch=monkeypatch)
    assert list(chain(*found.passes)) == list(chain(*undisturbed.passes))
    assert_same(found, undisturbed)


@pytest.mark.parametrize("rows", [1, 2])
def test_running_out_of_memory_changes_neither_losses_nor_adapter(
    rows: int,
    still: Recipe,
    examples: Dataset,
    undisturbed: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = train_here(still, examples, tmp_path, disturb=RoomFor(rows), monkeypatch=monkeypatch)
    assert max(map(len, found.passes)) == rows
    assert_same(found, undisturbed)


def test_gradients_of_a_pass_that_ran_out_of_memory_are_not_added_twice(
    disturbed: Training, undisturbed: Training
) -> None:
    assert_same(disturbed, undisturbed)


def test_a_step_that_ran_out_of_memory_is_done_again_from_its_start(disturbed: Training, undisturbed: Training) -> None:
    first, second = undisturbed.passes[:2]
    assert disturbed.passes[:5] == [first, first[:2], first[2:], second[:2], second[2:]]


def test_metrics_and_record_say_that_memory_ran_out(disturbed: Training, undisturbed: Training) -> None:
    assert [line["micro_batch"] for line in undisturbed.metrics] == [4, 4, 4]
    assert [line["micro_batch"] for line in disturbed.metrics] == [2, 2, 2]
    [event] = map(json.loads, (disturbed.folder / OUT_OF_MEMORY).read_text().splitlines())
    assert event == {"step": 1, "samples": 4, "pieces": 2, "device": "CPU, float32, not quantized"}


def test_a_training_that_goes_on_does_not_run_out_of_memory_again(
    still: Recipe, examples: Dataset, undisturbed: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = still.model_copy(update={"save_steps": 1})
    room, in_second_step = RoomFor(2), Interrupted(at=6)
    with pytest.raises(KeyboardInterrupt):
        train_here(saving, examples, tmp_path, disturb=each(room, in_second_step), monkeypatch=monkeypatch)
    found = train_here(saving, examples, tmp_path, disturb=room, monkeypatch=monkeypatch)
    assert len((tmp_path / OUT_OF_MEMORY).read_text().splitlines()) == 1
    assert [len(ids) for ids in found.passes] == [2] * 8
    assert_same(found, undisturbed)


def test_a_sample_that_does_not_fit_alone_ends_with_the_remedy(
    still: Recipe, examples: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutOfMemory) as caught:
        train_here(still, examples, tmp_path, disturb=RoomFor(0), monkeypatch=monkeypatch)
    message = str(caught.value)
    assert message.startswith("out of memory in step 1 with sample ")
    assert all(remedy in message for remedy in ("checkpointing", "max_image_tokens", "nf4", "lora_rank"))


def test_no_room_for_the_optimizer_ends_with_the_remedy(
    still: Recipe, examples: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", raise_out_of_memory)
    with pytest.raises(OutOfMemory, match=r"outside the forward and backward pass: CUDA out of memory.*lora_rank"):
        train_here(still, examples, tmp_path, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("disturb", "what", "ids"),
    [
        (Poisons(at=3), "the loss is not finite in step 2", slice(2, 3)),
        (GradientsExplode(at=3), "the gradient norm is (nan|inf) in step 2", slice(2, 4)),
    ],
)
def test_a_step_that_is_not_finite_ends_with_its_samples_and_is_not_saved(
    disturb: Disturb,
    what: str,
    ids: slice,
    still: Recipe,
    examples: Dataset,
    undisturbed: Training,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saving = still.model_copy(update={"save_steps": 1})
    samples = ", ".join(chain(*undisturbed.passes[ids]))
    with pytest.raises(Diverged, match=f"{what}, with samples {samples}. ") as caught:
        train_here(saving, examples, tmp_path, disturb=disturb, monkeypatch=monkeypatch)
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    assert recall(tmp_path) == str(caught.value)


def test_one_of_several_processes_asks_all_to_start_again_in_smaller_pieces(tmp_path: Path) -> None:
    path = tmp_path / OUT_OF_MEMORY
    training = SimpleNamespace(
        _piece_ids=[["a", "b"]],
        state=SimpleNamespace(global_step=4),
        pieces=Pieces(path, device="a GPU"),
        args=SimpleNamespace(world_size=2),
    )
    with pytest.raises(StartAgain, match=r"in step 5 on one of 2 processes: all go on .* with batches in 2 pieces"):
        Trainer._make_room(training, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert Pieces(path, device="a GPU").count == 2
    training._piece_ids = [["a"]]
    with pytest.raises(OutOfMemory, match="with sample a alone"):  # which would only come again
        Trainer._make_room(training, torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_a_checkpoints_folder_is_there_before_any_process_looks_whether_it_is_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []
    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", lambda *_: found.append((tmp_path / "checkpoint-5").is_dir()))
    training = object.__new__(Trainer)
    training.args = SimpleNamespace(output_dir=str(tmp_path))
    training.state = SimpleNamespace(global_step=5)
    training._save_checkpoint(torch.nn.Linear(1, 1), None)
    assert found == [True]
