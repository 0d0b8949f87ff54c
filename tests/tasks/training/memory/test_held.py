"""What each of several processes holds, beside rows that torch shares out and peaks that were measured on two H100s."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from tasks.training.memory.estimate import LOADING, MemoryModel, Workload
from tasks.training.memory.fits import what_fits
from tasks.training.memory.held import held_by_each
from tasks.training.memory.skeleton import Skeleton, skeleton_of
from tasks.training.recipe import Recipe, Sharding
from tests.tasks.training.memory.shapes import GIB, gemma_31b

FULL = Recipe(base_model="m", method="full", full_parts=("language", "projector"), batch_size=8)
QLORA = Recipe(base_model="m", quantization="nf4")


def shared(recipe: Recipe, gpus: int, sharding: Sharding = "fsdp") -> Recipe:
    return recipe.model_copy(update={"gpus": gpus, "sharding": sharding})


@pytest.fixture(scope="module")
def tiny(gemma: Path) -> Skeleton:
    return skeleton_of(AutoConfig.from_pretrained(gemma), FULL)


@pytest.mark.parametrize(("gpus", "sharding", "measured"), [(1, "none", 17.10), (2, "none", 17.91), (2, "fsdp", 13.10)])
def test_four_bit_training_takes_as_much_as_was_measured(gpus: int, sharding: Sharding, measured: float) -> None:
    """30 layers of the 31B's width, 8 rows of 320 tokens with an image each, all layers computed again."""
    recipe = shared(QLORA, gpus, sharding)
    model = MemoryModel(skeleton_of(gemma_31b(30), recipe), recipe, compiled=False)
    assert model.estimate(Workload(8, 320)).peak_bytes / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize(("sharding", "measured"), [("fsdp", 33.71), ("zero3", 34.97)])
def test_two_gpus_train_in_full_in_as_much_as_was_measured(sharding: Sharding, measured: float) -> None:
    """24 layers of half the 31B's width, 8 rows of 320 tokens with an image each, all layers computed again."""
    recipe = shared(FULL, 2, sharding)
    model = MemoryModel(skeleton_of(gemma_31b(24, parts=2), recipe), recipe, compiled=False)
    assert model.estimate(Workload(8, 320)).peak_bytes / GIB == pytest.approx(measured, rel=0.1)


def test_each_keeps_its_rows_their_gradients_and_their_states(tiny: Skeleton) -> None:
    found = held_by_each(tiny, shared(FULL, 3))
    rows = sum(weight.chunk(3)[0].numel() for weight in tiny.trained())
    assert (found.trained, found.gradients, found.optimizer) == (4 * rows, 4 * rows, 8 * rows)
    frozen = [weight for weight in tiny.model.parameters() if not weight.requires_grad]
    buffers = sum(buffer.nbytes for buffer in tiny.model.buffers())
    assert found.weights == sum(weight.chunk(3)[0].nbytes for weight in frozen) + buffers


def test_zero3_keeps_what_it_trains_twice(tiny: Skeleton) -> None:
    rows = sum(weight.chunk(3)[0].numel() for weight in tiny.trained())
    found = held_by_each(tiny, shared(FULL, 3, "zero3"))
    assert (found.trained, found.optimizer) == ((2 + 4) * rows, 8 * rows)  # in bf16 and in fp32


def test_embeddings_and_two_layers_are_whole_while_a_layer_is_at_work(tiny: Skeleton) -> None:
    language = [sum(w.numel() for w in layer.parameters()) for layer in tiny.decoder.layers]
    towers = [layer for name, layer in tiny.base.named_modules() if name.endswith(".layers") and "vision" in name]
    vision = [sum(w.numel() for w in layer.parameters()) for layer in towers[0]]
    patches = sum(w.numel() for name, w in tiny.base.named_parameters() if "patch_embedder" in name)  # a unit too
    beside = tiny.base.num_parameters() - sum(language) - sum(vision) - patches
    assert held_by_each(tiny, shared(FULL, 2)).gathered == 2 * (beside + 2 * max(*language, *vision))  # bf16


def test_data_parallel_processes_hold_what_one_alone_does_and_copies_of_gradients(tiny: Skeleton) -> None:
    alone, each = held_by_each(tiny, FULL), held_by_each(tiny, shared(FULL, 4, "none"))
    assert each == replace(alone, reducing=alone.gradients, stepping=2 * alone.stepping)


def test_a_four_bit_model_is_whole_on_each_gpu_before_it_is_shared() -> None:
    config = gemma_31b(layers=6)
    alone = skeleton_of(config, QLORA)
    trained = sum(weight.nbytes for weight in alone.trained())
    model = MemoryModel(alone, shared(QLORA, 64))
    found = model.estimate(Workload(1, 32, images=0))
    assert (found.moment, found.peak_bytes) == (LOADING, alone.weight_bytes() + trained)
    assert model.resting.weights < alone.weight_bytes() / 4


def test_each_process_fetches_its_share_of_a_steps_batches(tiny: Skeleton) -> None:
    recipe = FULL.model_copy(update={"accumulation": 4})
    workload = Workload(2, 64, image_tokens=16)
    alone = MemoryModel(tiny, recipe).estimate(workload)
    assert MemoryModel(tiny, shared(recipe, 2)).estimate(workload).inputs == alone.inputs / 2


def test_no_layout_has_passes_that_the_gpus_can_not_share() -> None:
    recipe = shared(FULL, 4).model_copy(update={"batch_size": 1, "accumulation": 8})
    config = gemma_31b(layers=6)
    [found] = what_fits(config, recipe, 48 * GIB, sample_tokens=64, images=0)
    assert found.accumulation % 4 == 0
    assert found.batch_size * found.accumulation == 8
    assert what_fits(config, shared(recipe, 1, "none"), 48 * GIB, sample_tokens=64, images=0) == []
