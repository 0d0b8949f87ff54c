"""A model with its adapter but without weights: what it weighs, and the layers to rehearse with what they are given."""

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.training import model as models
from tasks.training.families import without_adapter
from tasks.training.memory.rehearsal import Allocations, AsOnGPU, Footprint, rehearse, rehearse_frozen, size
from tasks.training.model import ModelError
from tasks.training.recipe import Recipe

NF4_CODE_BYTES = 0.5
NF4_BYTES = NF4_CODE_BYTES + 1 / 64 + 4 / (64 * 256)
"""Bytes a weight takes in NF4 with double quantisation: its code, an 8-bit scale per 64, and a scale of those per 256.

That is 4.127 bits (Dettmers et al., 2023, section 3).
"""


@dataclass(frozen=True)
class Layer:
    """One layer of the stack: its footprint, the bytes of its gradients, and whether it belongs to the vision tower."""

    footprint: Footprint
    gradients: int
    vision: bool


@dataclass(frozen=True)
class Stack:
    """The layers from bottom to top, and what is held around them, bytes.

    `around` is what the language model keeps beside its layers: embeddings, per-layer inputs, the last norm.
    `frozen_vision` is the most that a vision tower without gradients holds while it runs.
    """

    layers: tuple[Layer, ...]
    around: int
    frozen_vision: int


def skeleton_of(config: PretrainedConfig, recipe: Recipe, *, adapter_dtype: torch.dtype = torch.float32) -> "Skeleton":
    """Return the model of `config`, adapted as `recipe` says for a GPU, its adapters in `adapter_dtype`, on `meta`."""
    dtype = torch.float32 if recipe.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        base = AutoModelForMultimodalLM.from_config(config, dtype=dtype)
        model = models.make_trainable(base, recipe, parent=None)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(adapter_dtype)
    return Skeleton(model, four_bit=recipe.is_four_bit(on_gpu=True), dtype=dtype)


def rows_of_part(weight: torch.Tensor, ranks: int) -> int:
    """Return the elements that the first of `ranks` processes has of a weight whose rows they share."""
    if weight.dim() == 0:
        return 1
    rows = weight.shape[0]
    return -(-rows // ranks) * (weight.numel() // max(rows, 1))


class Skeleton:
    """A model on PyTorch's `meta` device with gradients for what is trained.

    With `four_bit`, the language model's frozen linear layers count as NF4 with double quantisation. `dtype` is what is
    computed in.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, four_bit: bool, dtype: torch.dtype) -> None:
        base = without_adapter(model)
        self.model, self.base, self.four_bit, self.dtype = model.train(), base, four_bit, dtype
        self.config = base.config

    def trained(self) -> list[nn.Parameter]:
        """Return the weights that get gradients."""
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    def weight_bytes(self, *, ranks: int = 1) -> int:
        """Return what one of `ranks` processes holds of the frozen weights that they share; tied ones count once.

        Buffers, which it includes, and the scales of 4-bit weights are whole in each.
        """
        packed = self.packed()
        total = 0.0
        for weight in self.model.parameters():
            if id(weight) in packed:
                total += rows_of_part(weight, ranks) * NF4_CODE_BYTES + weight.numel() * (NF4_BYTES - NF4_CODE_BYTES)
            elif not weight.requires_grad:
                total += rows_of_part(weight, ranks) * weight.element_size()
        return int(total) + sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers())

    def largest_unpacked(self) -> int:
        """Return the size of the largest weight that is held in 4 bits, when it is unpacked."""
        packed = self.packed()
        return max((w.numel() * w.element_size() for w in self.model.parameters() if id(w) in packed), default=0)

    def packed(self) -> set[int]:
        """Return the ids of the weights that are held in 4 bits."""
        if not self.four_bit:
            return set()
        linears = models.linear_names(self.decoder).values()
        return {id(module.weight) for module in linears if not module.weight.requires_grad}

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        decoder = self.base.get_decoder()
        assert isinstance(decoder, nn.Module)
        return decoder

    @property
    def vision(self) -> nn.Module | None:
        """The vision tower, or None."""
        named = {name.rpartition(".")[2]: name for name in models.modules_beside_decoder(self.base)}
        found = [name for short, name in named.items() if short.startswith("visi") or short == "visual"]
        return self.base.get_submodule(found[0]) if found else None

    def stack(self, *, batch: int, tokens: int, images: int, image_tokens: int) -> Stack:
        """Rehearse a micro-batch of `batch` rows of `tokens` tokens with `images` images of `image_tokens` in all.

        Raises `ModelError` if the vision tower is trained and it is not known what such images are to it.
        """
        call = self._vision_call(images, image_tokens) if images else None
        frozen, vision = 0, list[Layer]()
        if call and self.vision and _gradients(self.vision):
            footprint = rehearse(*call, four_bit=False, dtype=self.dtype)
            vision = [Layer(footprint, _gradients(layer), True) for layer in _repeated(self.vision)]
        elif call:
            frozen = rehearse_frozen(*call, dtype=self.dtype)
        language, around = self._language(batch, tokens, images_trained=bool(vision))
        return Stack((*vision, *language), around, frozen)

    def _language(self, batch: int, tokens: int, *, images_trained: bool) -> tuple[list[Layer], int]:
        ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
        mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool, device="meta")
        run = partial(self.decoder, input_ids=ids, attention_mask=mask, use_cache=False)
        layers = _repeated(self.decoder)
        kinds = {_kind(layer): layer for layer in reversed(layers)}
        # layers that read the keys and values of others are given them only if those run too
        chosen = layers if getattr(self.config.get_text_config(), "num_kv_shared_layers", 0) else list(kinds.values())
        others = [layer for layer in layers if layer not in chosen]
        with AsOnGPU(four_bit=self.four_bit, dtype=self.dtype):
            with torch.no_grad(), _skipped(others), _calls(chosen) as calls:
                run()
            embeddings = self.base.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda _, __, out: out.requires_grad_() if images_trained else None)
            with _skipped(layers), Allocations() as memory:
                out = run().last_hidden_state
                around = memory.live - size(out)
            hook.remove()
        known = {
            _kind(call[0]): rehearse(*call, four_bit=self.four_bit, dtype=self.dtype)
            for call in calls
            if call[0] in kinds.values()
        }
        return [Layer(known[_kind(layer)], _gradients(layer), False) for layer in layers], around

    def _vision_call(self, images: int, image_tokens: int) -> "Call | None":
        """What the first layer of the vision tower is given; None if it is not known and the tower is not trained."""
        tower = self.vision
        if tower is None:
            return None
        layers = _repeated(tower)
        try:
            with torch.no_grad(), AsOnGPU(four_bit=False, dtype=self.dtype), _calls(layers[:1], stop=True) as calls:
                tower(**image_inputs(self.config.vision_config, images, image_tokens, self.dtype))
        except _Reached:
            return calls[0]
        except Exception as error:
            if not _gradients(tower):
                return None  # what it takes while it runs without gradients is little beside the language model
            raise ModelError(
                f"{type(tower).__name__}: it is not known what images are to it ({error}), so the memory of training "
                "it can't be predicted. Leave vision out of lora_parts, or set the batch yourself."
            ) from None
        raise AssertionError("the vision tower never called its first layer")


def image_inputs(
    vision: PretrainedConfig, images: int, image_tokens: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return what a vision tower takes for `images` images that become up to `image_tokens` tokens each, on `meta`.

    Knows towers that take patches with their positions (Gemma 4), patches with a grid (Qwen) and square pictures
    (CLIP, SigLIP).
    """
    if hasattr(vision, "pooling_kernel_size"):
        patches = image_tokens * vision.pooling_kernel_size**2
        return {
            "pixel_values": torch.empty(images, patches, 3 * vision.patch_size**2, device="meta"),
            "pixel_position_ids": torch.zeros(images, patches, 2, dtype=torch.long, device="meta"),
        }
    if hasattr(vision, "spatial_merge_size"):
        across = image_tokens * vision.spatial_merge_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {
            "hidden_states": torch.empty(
                images * across * vision.spatial_merge_size, patch, dtype=dtype, device="meta"
            ),
            "grid_thw": torch.tensor([[1, vision.spatial_merge_size, across]] * images),
        }
    side = vision.image_size
    return {"pixel_values": torch.empty(images, 3, side, side, dtype=dtype, device="meta")}


Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


class _Reached(Exception):  # noqa: N818 - no fault
    """The layer whose inputs are wanted was called."""


@contextmanager
def _calls(layers: Sequence[nn.Module], *, stop: bool = False) -> Iterator[list[Call]]:
    """Give a list that fills with calls of the layers, hidden states first; `stop` raises `_Reached` at the first."""
    found: list[Call] = []

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = {name: copy(value) if isinstance(value, MutableMapping) else value for name, value in kwargs.items()}
        found.append((layer, args or (own.pop("hidden_states"),), own))
        if stop:
            raise _Reached

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _skipped(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let the layers return the hidden states they are given."""
    for layer in layers:
        layer.forward = lambda *args, **kwargs: args[0] if args else kwargs["hidden_states"]  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _repeated(module: nn.Module) -> list[nn.Module]:
    """The layers that a tower or decoder is a stack of; of those trained in full beside LoRA, the copies that run."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, GradientCheckpointingLayer)}
    return [layer for name, layer in layers.items() if "original_module" not in name.split(".")]


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Layers whose weights agree in name, shape, dtype and whether they are trained have the same footprint."""
    return tuple((name, w.shape, w.dtype, w.requires_grad) for name, w in layer.named_parameters())


def _gradients(layer: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in layer.parameters() if weight.requires_grad)
