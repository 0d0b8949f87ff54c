"""Patches that only pad are cut off, and the model does not notice."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from tasks.training import model as models
from tasks.training.patches import MULTIPLE, trim_patches
from tasks.training.recipe import Recipe


@pytest.mark.parametrize("sizes", [[(64, 192), (100, 300)], [(30, 300), (70, 80)]], ids=["equal", "unequal"])
def test_a_model_says_the_same_without_the_padding(gemma: Path, recipe: Recipe, sizes: list[tuple[int, int]]) -> None:
    model = models.load_model(gemma, models.place(recipe))
    processor = AutoProcessor.from_pretrained(gemma)
    images = [[Image.effect_noise(size, 80).convert("RGB")] for size in sizes]
    texts = [processor.image_token + "x"] * len(sizes)
    whole = dict(processor(images=images, text=texts, return_tensors="pt", padding=True))
    trimmed = trim_patches(whole)
    assert trimmed["pixel_values"].shape[1] < whole["pixel_values"].shape[1]
    with torch.no_grad():
        torch.testing.assert_close(model(**trimmed).logits, model(**whole).logits, rtol=1e-4, atol=1e-4)


def test_no_patch_of_an_image_is_cut() -> None:
    positions = torch.full((2, 4 * MULTIPLE, 2), -1)
    positions[0, : MULTIPLE + 1] = 0
    positions[1, :5] = 0
    batch = {"pixel_values": torch.ones(2, 4 * MULTIPLE, 3), "image_position_ids": positions}
    assert trim_patches(batch)["pixel_values"].shape == (2, 2 * MULTIPLE, 3)


def test_batches_of_other_models_stay_as_they_are() -> None:
    batch = {"pixel_values": torch.ones(1, 3, 8, 8), "input_ids": torch.ones(1, 4)}
    assert trim_patches(batch) is batch
