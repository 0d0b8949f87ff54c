"""What makes a step fast changes neither its loss nor its gradients, and frozen towers see no backward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor, nn

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.attention import use_short_attention
from tasks.training.batches import PaddedCollator
from tasks.training.conversations import make_collator
from tasks.training.dataset import read_examples, write_examples
from tasks.training.features import with_features
from tasks.training.fused_lora import fuse_lora
from tasks.training.recipe import Recipe
from tasks.training.speed import checkpoint_layers, compile_layers, decoder, decoder_layers
from tasks.training.template import stop_ids
from tests.tasks.training import tiny_models

Batch = dict[str, Any]


@pytest.fixture(scope="module")
def rows(squares: tuple[Warehouse, SnapshotRef], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    warehouse, snapshot = squares
    path = tmp_path_factory.mktemp("rows") / "examples.arrow"
    write_examples(snapshot, recipe, split="train", warehouse=warehouse, path=path)
    return read_examples(path)


def adapted(recipe: Recipe) -> Any:
    base = models.load_model(recipe.base_model, models.place(recipe))
    torch.manual_seed(0)
    model = models.make_trainable(base, recipe, parent=None)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)  # zero at first, which would hide A's gradient
    return model.train()


def collator_of(recipe: Recipe, model: Any, rows: Dataset) -> Any:
    return make_collator(models.load_processor(recipe.base_model, recipe), rows, stop_ids(model.get_base_model()))


def outcome(model: Any, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: w.grad for name, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize(("quantization", "share"), [("none", 0.0), ("none", 0.5), ("none", 1.0), ("nf4", 0.5)])
def test_the_fast_path_gives_the_loss_and_gradients_of_the_plain_one(
    rows: Dataset, recipe: Recipe, quantization: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.model_copy(update={"quantization": quantization, "cache_vision_features": True})
    chosen = [rows[at] for at in (0, 5, 9)]
    plain = adapted(recipe)
    wanted_loss, wanted = outcome(plain, collator_of(recipe, plain, rows)(chosen))

    fast = adapted(recipe)
    pad = fast.get_base_model().config.get_text_config().pad_token_id
    features = with_features(collator_of(recipe, fast, rows), fast, rows, recipe, epochs=9, folder=tmp_path)
    batch = PaddedCollator(features, pad)(chosen)
    assert "pixel_values" not in batch
    assert batch["input_ids"].shape[1] % 64 == 0
    assert fuse_lora(fast) == 27
    checkpoint_layers(fast, share)
    use_short_attention(decoder(fast))
    compile_module = nn.Module.compile  # by the partitioner alone: building kernels takes a minute
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **options: compile_module(self, backend="aot_eager_decomp_partition", **options),
    )
    compile_layers(fast)
    loss, found = outcome(fast, batch)

    assert loss == pytest.approx(wanted_loss, rel=1e-4)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        similarity = torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
        assert similarity > 0.9999, name


@pytest.mark.parametrize(("share", "numbers"), [(0.0, []), (0.25, [3]), (0.5, [1, 3]), (1.0, [0, 1, 2, 3])])
def test_layers_computed_again_are_spread_evenly(recipe: Recipe, share: float, numbers: list[int]) -> None:
    model = adapted(recipe)
    assert checkpoint_layers(model, share) == len(numbers)
    assert [at for at, layer in enumerate(decoder_layers(model)) if layer.gradient_checkpointing] == numbers


def test_no_gradient_goes_back_through_a_frozen_vision_tower(tmp_path: Path) -> None:
    folder = tiny_models.write("llava clip llama", tmp_path)
    recipe = Recipe(base_model=str(folder), completion="caption")
    ours, theirs = adapted(recipe), adapted(recipe)
    checkpoint_layers(ours, 1.0)
    theirs.enable_input_require_grads()  # as trainers do where layers are computed again
    processor: Any = models.load_processor(folder, recipe)
    text = processor.image_token + "x"
    batch = processor(images=[Image.new("RGB", (30, 30))], text=[text], return_tensors="pt")
    assert not sees_gradients(ours, batch)
    assert sees_gradients(theirs, batch)


def sees_gradients(model: Any, batch: Batch) -> bool:
    """Whether the vision tower's output would be differentiated."""
    seen: list[bool] = []
    tower = model.get_base_model().model.vision_tower
    hook = tower.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state.requires_grad))
    model(**batch)
    hook.remove()
    return seen[0]
