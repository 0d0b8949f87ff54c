"""Batches by tokens: what holds for any lengths, and what a training makes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training.batches import MULTIPLE, BatchError, PaddedCollator, TokenBatches
from tasks.training.child import run
from tasks.training.collate import IGNORED
from tasks.training.dataset import write_examples
from tasks.training.recipe import Recipe

lengths = st.lists(st.integers(1, 900), min_size=4, max_size=120)


def batches_of(counts: list[int], *, epoch: int = 0, **options: int) -> list[list[int]]:
    found = TokenBatches(counts, [str(at) for at in range(len(counts))], **{"tokens": 1024, "seed": 0, **options})
    found.start_epoch(epoch)
    return list(found)


@given(lengths, st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_no_row_is_lost_or_comes_twice(counts: list[int], epoch: int, processes: int) -> None:
    found = batches_of(counts, epoch=epoch, processes=processes)
    rows = sorted(row for batch in found for row in batch)
    if max(map(len, found)) > 1:
        assert rows == list(range(len(counts)))
    else:  # batches of one row can't be halved to give each process as many
        assert set(rows) == set(range(len(counts)))
        assert len(rows) - len(counts) < processes


@given(lengths, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_batches_keep_to_the_budget_and_epochs_have_equally_many(counts: list[int], processes: int) -> None:
    ids = [str(at) for at in range(len(counts))]
    sampler = TokenBatches(counts, ids, tokens=1024, seed=1, processes=processes)
    for epoch in range(3):
        sampler.start_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        assert len(found) % processes == 0
        padded = [-(-max(counts[row] for row in batch) // MULTIPLE) * MULTIPLE * len(batch) for batch in found]
        assert max(padded) <= 1024


def test_the_same_seed_and_epoch_give_the_same_batches_and_others_do_not() -> None:
    counts = list(range(1, 300))
    assert batches_of(counts, epoch=1) == batches_of(counts, epoch=1)
    assert batches_of(counts, epoch=1) != batches_of(counts, epoch=2)
    assert batches_of(counts, epoch=1) != batches_of(counts, epoch=1, seed=5)


def test_like_lengths_go_together() -> None:
    rng = np.random.default_rng(0)
    counts = rng.integers(10, 1000, 2000).tolist()

    def padding(found: list[list[int]]) -> float:
        return 1 - sum(counts) / sum(max(counts[row] for row in batch) * len(batch) for batch in found)

    grouped = batches_of(counts, tokens=8192)
    at_random = np.array_split(rng.permutation(2000), len(grouped))
    assert padding([batch.tolist() for batch in at_random]) > 0.3
    assert padding(grouped) < 0.07


def test_batches_have_few_shapes() -> None:
    counts = np.random.default_rng(0).integers(200, 400, 5000).tolist()
    found = batches_of(counts, tokens=4096)
    shapes = {(len(batch), -(-max(counts[row] for row in batch) // MULTIPLE)) for batch in found}
    assert len(shapes) <= 5  # one for each of four lengths, and the last batch


def test_batches_side_by_side_are_of_like_length() -> None:
    counts = np.random.default_rng(0).integers(10, 1000, 3000).tolist()
    found = batches_of(counts, tokens=4096, processes=4)
    longest = [max(counts[row] for row in batch) for batch in found]
    apart = [max(longest[at : at + 4]) - min(longest[at : at + 4]) for at in range(0, len(longest), 4)]
    assert np.mean(apart) < MULTIPLE


def test_a_sample_longer_than_a_batch_is_named() -> None:
    with pytest.raises(BatchError, match=r"sample b has 1088 tokens.* 1 others are longer than the 1024 of a batch"):
        TokenBatches([5, 1025, 1030], ["a", "b", "c"], tokens=1024, seed=0)


def test_padding_changes_only_the_end() -> None:
    ids, labels, ones = torch.tensor([[5, 6]]), torch.tensor([[IGNORED, 6]]), torch.ones(1, 2)
    short = {"input_ids": ids, "labels": labels, "attention_mask": ones, "pixel_values": ones}
    batch = PaddedCollator(lambda rows: short, pad_id=9)([{}])
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (1, MULTIPLE),
        "labels": (1, MULTIPLE),
        "attention_mask": (1, MULTIPLE),
        "pixel_values": (1, 2),
    }
    assert batch["input_ids"][0, :3].tolist() == [5, 6, 9]
    assert batch["labels"][0, :3].tolist() == [IGNORED, 6, IGNORED]
    assert batch["attention_mask"].sum() == 2


Squares = tuple[Warehouse, SnapshotRef]


def trained(squares: Squares, recipe: Recipe, folder: Path) -> list[dict[str, float]]:
    """Train in this process and return the metrics of each step."""
    folder.mkdir(exist_ok=True)
    warehouse, snapshot = squares
    write_examples(snapshot, recipe, split="train", warehouse=warehouse, path=folder / "examples.arrow")
    config = {
        "recipe": recipe.model_dump(),
        "model": recipe.base_model,
        "examples": str(folder / "examples.arrow"),
        "parent_adapter": None,
    }
    run(config, folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def by_tokens(recipe: Recipe) -> Recipe:
    """Batches of a few of the 13 squares each; two passes a step, over more than one epoch."""
    return recipe.model_copy(update={"tokens_per_batch": 1024, "lora_dropout": 0.0, "max_steps": 5, "save_steps": 1})


def test_a_resumed_training_goes_on_with_the_batch_that_comes_next(
    squares: Squares, by_tokens: Recipe, tmp_path: Path
) -> None:
    whole = trained(squares, by_tokens, tmp_path / "whole")
    for checkpoint in (tmp_path / "whole" / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > 4:
            (checkpoint / "complete").unlink()
    again = trained(squares, by_tokens, tmp_path / "whole")
    assert len(again) == 5
    assert [step["loss"] for step in again] == [step["loss"] for step in whole]
    assert [step["tokens"] for step in again] == [step["tokens"] for step in whole]


def test_a_training_whose_last_step_is_saved_takes_no_other(
    squares: Squares, by_tokens: Recipe, tmp_path: Path
) -> None:
    """Killed between its last checkpoint and its adapter, in the middle of an epoch."""
    constant = by_tokens.model_copy(update={"tokens_per_batch": 256, "scheduler": "constant", "max_steps": 3})
    whole = trained(squares, constant, tmp_path)
    adapter = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert trained(squares, constant, tmp_path) == whole
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_uneven_batches_of_a_step_count_by_their_supervised_tokens(
    squares: Squares, by_tokens: Recipe, tmp_path: Path
) -> None:
    one_step = {"max_steps": 1, "checkpointed_share": 0}
    apart = by_tokens.model_copy(update={**one_step, "accumulation": 13})
    together = by_tokens.model_copy(update={**one_step, "tokens_per_batch": None, "batch_size": 13, "accumulation": 1})
    [cut], [whole] = (
        trained(squares, recipe, tmp_path / name) for name, recipe in (("cut", apart), ("whole", together))
    )
    assert cut["tokens"] == whole["tokens"]
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches(processes: int) -> None:
    counts = list(range(1, 500))
    sampler = TokenBatches(counts, [""] * len(counts), tokens=2048, seed=0, processes=processes)
    shards = [list(BatchSamplerShard(sampler, processes, rank)) for rank in range(processes)]
    assert len({len(shard) for shard in shards}) == 1
    assert sorted(row for shard in shards for batch in shard for row in batch) == list(range(len(counts)))
