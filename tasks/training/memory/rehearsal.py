"""Rehearses a layer's forward and backward pass without data, and counts the memory each moment of it would hold.

The layer lies on PyTorch's `meta` device: shapes, dtypes and lifetimes are real, bytes are not. So what is counted is
what the layer's own code allocates, whatever the model's family, and no formula has to follow the code by hand.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

BLOCK = 512
"""What PyTorch's caching allocator rounds a storage up to, bytes."""


@dataclass(frozen=True)
class Footprint:
    """What one layer holds, bytes, beyond its weights and the hidden states it is given.

    `hidden` is the size of those hidden states, and of those it returns. `kept` is what its eager forward keeps for the
    backward pass, and `kept_compiled` the same for `torch.compile`, which keeps what comes out of matrix products and
    what attention works on, and computes the rest again from that (with functorch's
    `ban_recompute_materialized_backward` off). `working` is the most its two passes hold beyond `kept`, the gradients
    of its own weights included.
    """

    hidden: int
    kept: int
    kept_compiled: int
    working: int

    def kept_by(self, *, compiled: bool) -> int:
        """Return what the forward pass keeps for the backward pass without recomputation."""
        return self.kept_compiled if compiled else self.kept


def rehearse(
    layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, four_bit: bool, dtype: torch.dtype
) -> Footprint:
    """Return the footprint of `layer(*args, **kwargs)`, where `args[0]` is the hidden states, all on `meta`.

    With `four_bit`, every frozen linear layer is unpacked to `dtype` anew for each matrix product, as bitsandbytes
    does. Weights that are not in `dtype` are cast to it where they are used, as autocast does.
    """
    with _plain_lora_input(layer, plain=four_bit), AsOnGPU(four_bit=four_bit, dtype=dtype) as mode:
        given = args[0].detach().requires_grad_()
        with Allocations() as memory:
            out = _first(layer(given, *args[1:], **kwargs))
            kept = memory.live - size(out)
            out.backward(torch.empty_like(out))
        working = memory.peak - kept
        for weight in layer.parameters():
            weight.grad = None
        with _recorded(layer, mode) as tensors:
            layer(given, *args[1:], **kwargs)
            storages = {tensor.untyped_storage()._cdata: size(tensor) for tensor in tensors}
            storages.pop(given.untyped_storage()._cdata, None)
    return Footprint(hidden=size(given), kept=kept, kept_compiled=sum(storages.values()), working=working)


def rehearse_frozen(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, dtype: torch.dtype) -> int:
    """Return the most that a forward pass without gradients holds beyond the layer's weights and what it is given."""
    memory = Allocations()
    with AsOnGPU(four_bit=False, dtype=dtype), memory, torch.no_grad():
        layer(*args, **kwargs)
    return memory.peak


def size(tensor: torch.Tensor) -> int:
    """Return what the storage behind a tensor takes, bytes."""
    return _rounded(tensor.untyped_storage())


def _rounded(storage: torch.UntypedStorage) -> int:
    taken: int = storage.nbytes()
    return -(-taken // BLOCK) * BLOCK


def _first(output: Any) -> torch.Tensor:
    """A layer returns hidden states, in some families in a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that were made under it and are still held: `live`, and the `peak` of it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages([args, kwargs])}
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, taken = storage._cdata, _rounded(storage)
        self.live += taken
        self.peak = max(self.peak, self.live)

        def freed(_: object) -> None:
            self.live -= taken
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class AsOnGPU(TorchFunctionMode):
    """Stands in for what a GPU does otherwise than `meta`: fused attention, 4-bit weights and autocast."""

    def __init__(self, *, four_bit: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.four_bit, self.dtype = four_bit, dtype
        self.on_attention: Callable[[list[torch.Tensor]], None] = lambda tensors: None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **(kwargs or {}))
        if func is torch.Tensor.__bool__:
            return False  # asked whether a mask hides nothing, where there is no mask to look at: there is padding
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        leaves, shape = tree_flatten([args, kwargs or {}])
        args, kwargs = tree_unflatten(_on_one_device(leaves), shape)
        return func(*args, **kwargs)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: Any = None, *_: Any, **__: Any
    ) -> torch.Tensor:
        out: torch.Tensor = FusedAttention.apply(query, key, value, attn_mask)
        self.on_attention([query, key, out])  # values are computed again from their projection
        return out

    def _linear(self, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        given, cast = given.to(self.dtype), weight.to(self.dtype)
        if self.four_bit and not weight.requires_grad:
            out: torch.Tensor = UnpackedLinear.apply(given, cast)
            return out if bias is None else out + bias
        return F.linear(given, cast, None if bias is None else bias.to(self.dtype))


def _on_one_device(values: list[Any]) -> list[Any]:
    """Sizes of images are real numbers on the CPU, until they meet tensors without data."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len({tensor.device.type for tensor in tensors}) < 2:
        return values
    return [value.to("meta") if isinstance(value, torch.Tensor) else value for value in values]


class FusedAttention(torch.autograd.Function):
    """Attention that keeps its inputs, its output and a logarithm per query, never the scores (Dao et al., 2022).

    A boolean mask becomes one of the query's dtype, which is kept too, as PyTorch's memory-efficient kernel does.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        rows, heads, length, _ = query.shape
        out = query.new_empty(rows, length, heads, value.shape[3]).transpose(1, 2)  # as the kernels lay it out
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, None if mask is None else mask.to(query.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # noqa: D102
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


class UnpackedLinear(torch.autograd.Function):
    """A linear layer whose weight is unpacked for each product and kept by none, as bitsandbytes' MatMul4Bit."""

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # noqa: D102
        ctx.weight = weight
        return given @ torch.empty_like(weight).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # noqa: D102
        return grads[0] @ torch.empty_like(ctx.weight), None


@contextmanager
def _plain_lora_input(layer: nn.Module, *, plain: bool) -> Iterator[None]:
    """Let LoRA take its input as it comes, which PEFT does on 4-bit layers under autocast, and on no others."""
    adapted = [module for module in layer.modules() if isinstance(module, LoraLayer) and plain]
    for module in adapted:
        module.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.cast_input_dtype_enabled = True


@contextmanager
def _recorded(layer: nn.Module, mode: AsOnGPU) -> Iterator[list[torch.Tensor]]:
    """Give a list that fills with what comes out of matrix products, and with attention's tensors.

    The sum of a linear layer's output and its LoRA's is one result: the two addends need not be kept.
    """
    found: list[torch.Tensor] = []
    hooks = []
    inside = {id(part) for module in layer.modules() if isinstance(module, LoraLayer) for part in module.modules()}

    def result(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        found.append(output)

    for module in layer.modules():
        if isinstance(module, LoraLayer):
            hooks.append(module.register_forward_hook(result))
            hooks += [part.register_forward_hook(result) for part in module.lora_A.values()]
        elif isinstance(module, nn.Linear) and id(module) not in inside:
            hooks.append(module.register_forward_hook(result))
    mode.on_attention = found.extend
    try:
        yield found
    finally:
        mode.on_attention = lambda tensors: None
        for hook in hooks:
            hook.remove()
