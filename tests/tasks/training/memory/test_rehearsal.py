"""What a rehearsal counts on `meta` beside what autograd really keeps of the same layer on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from tasks.training import model as models
from tasks.training.memory.rehearsal import BLOCK, Allocations, Footprint
from tasks.training.memory.skeleton import Skeleton, skeleton_of
from tasks.training.recipe import Recipe

ROWS, TOKENS = 3, 160


@contextmanager
def kept_by_autograd(module: nn.Module) -> Iterator[dict[int, int]]:
    """Give the sizes of the distinct storages that autograd saves, without those of weights and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = -(-storage.nbytes() // BLOCK) * BLOCK
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def layer_calls(model: PreTrainedModel | PeftModel) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """What the layers of a language model are given for rows of which the last is padded."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
        for layer in base.get_decoder().layers
    ]
    mask = torch.ones(ROWS, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    with torch.no_grad():
        base.get_decoder()(input_ids=torch.ones(ROWS, TOKENS, dtype=torch.long), attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def footprints(skeleton: Skeleton) -> list[Footprint]:
    stack = skeleton.stack(batch=ROWS, tokens=TOKENS, images=0, image_tokens=70)
    return [layer.footprint for layer in stack.layers]


@pytest.mark.parametrize(
    ("quantization", "precision", "dropout"), [("none", "fp32", 0.0), ("none", "fp32", 0.1), ("nf4", "bf16", 0.0)]
)
def test_each_layer_keeps_what_autograd_keeps_on_a_cpu(
    gemma: Path, recipe: Recipe, quantization: str, precision: str, dropout: float
) -> None:
    changes = {"quantization": quantization, "precision": precision, "lora_dropout": dropout, "lora_rank": 16}
    chosen = recipe.model_copy(update=changes)
    placement = models.place(chosen)
    real = models.add_lora(models.load_model(gemma, placement), chosen, base_model="m").train()
    for weight in real.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(placement.dtype)
    rehearsed = footprints(skeleton_of(AutoConfig.from_pretrained(gemma), chosen, adapter_dtype=placement.dtype))
    for (layer, (hidden, *args), kwargs), footprint in zip(layer_calls(real), rehearsed, strict=True):
        given = hidden.detach().requires_grad_()
        around = {tensor.untyped_storage().data_ptr() for tensor in (given, *kwargs["position_embeddings"])}
        with kept_by_autograd(layer) as kept:
            layer(given, *args, **kwargs)
        expected = sum(taken for address, taken in kept.items() if address not in around)
        assert footprint.hidden == given.nbytes
        assert footprint.kept == pytest.approx(expected, rel=0.02)


def test_full_and_sliding_layers_differ(gemma: Path, recipe: Recipe) -> None:
    chosen = recipe.model_copy(update={"quantization": "none", "precision": "fp32"})
    found = footprints(skeleton_of(AutoConfig.from_pretrained(gemma), chosen))
    assert found[0] == found[1] == found[2] != found[3]


@pytest.mark.parametrize("at", [0, 3], ids=["sliding", "full"])
def test_compiled_layers_keep_what_the_compiler_chooses(gemma: Path, recipe: Recipe, at: int) -> None:
    chosen = recipe.model_copy(update={"quantization": "none", "precision": "fp32", "lora_dropout": 0.0})
    real = models.add_lora(models.load_model(gemma, models.place(chosen)), chosen, base_model="m").train()
    layer, (hidden, *args), kwargs = layer_calls(real)[at]
    compiled = torch.compile(layer.forward, backend="aot_eager_decomp_partition", dynamic=False)
    given = hidden.detach().requires_grad_()
    around = {tensor.untyped_storage().data_ptr() for tensor in (given, *kwargs["position_embeddings"])}
    with functorch.patch(ban_recompute_materialized_backward=False), kept_by_autograd(layer) as kept:
        compiled(given, *args, **kwargs)
    expected = sum(taken for address, taken in kept.items() if address not in around)
    found = footprints(skeleton_of(AutoConfig.from_pretrained(gemma), chosen))[at]
    assert found.kept_compiled == pytest.approx(expected, rel=0.1)
    assert found.kept_compiled < 0.7 * found.kept


def test_allocations_know_what_is_held_and_what_was() -> None:
    memory = Allocations()
    with memory:
        first = torch.empty(1024)
        assert memory.live == 4096
        second = first * 2
        view = second[10:]
        del second
        assert memory.live == 2 * 4096  # the view holds all of it
        del view
        first.add_(1)
    assert (memory.live, memory.peak) == (4096, 8192)
    del first
    assert memory.live == 0


def test_allocations_round_up_as_the_allocator_does() -> None:
    memory = Allocations()
    with memory:
        one = torch.empty(1)
    assert memory.live == BLOCK
    del one
