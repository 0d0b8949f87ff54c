"""LoRA linears as one operation: base and adapter add up inside the matrix products, and 4-bit weights are never kept.

PEFT computes the base, clones it, computes the adapter beside it and adds the two, which moves every activation through
memory four more times. On a 4-bit base it is opaque to the compiler on purpose: seen through, the weights unpacked in
the forward pass could be kept for the backward pass, a whole model in 16 bits.
"""

from typing import Any

import torch
from bitsandbytes.functional import QuantState
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

_BLOCK, _NESTED_BLOCK = 64, 256


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRA linears of `model` that can be fused compute as one operation; return how many.

    Left as they are: layers with dropout, DoRA, a bias of their own or several adapters, and bases quantized other than
    as NF4 with double quantisation. Results differ by rounding only, and saving, merging and switching adapters off
    work as before.
    """
    fused = 0
    for module in model.modules():
        if type(module) is Linear and _can_fuse(module) and type(module.get_base_layer()) is nn.Linear:
            module.__class__ = _FusedLinear
        elif type(module) is Linear4bit and _can_fuse(module) and _is_double_nf4(module.get_base_layer()):
            module.__class__ = _FusedLinear4bit
        else:
            continue
        fused += 1
    return fused


def _can_fuse(module: Any) -> bool:
    [adapter, *others] = module.lora_A.keys() or [None]
    return (
        adapter is not None
        and not others
        and not module.lora_variant
        and not module.lora_bias[adapter]
        and isinstance(module.lora_dropout[adapter], nn.Identity)
    )


def _is_double_nf4(base: Any) -> bool:
    state: QuantState | None = getattr(base.weight, "quant_state", None)
    return (
        state is not None
        and state.quant_type == "nf4"
        and state.nested
        and (state.blocksize, state.state2.blocksize) == (_BLOCK, _NESTED_BLOCK)
    )


class _FusedForward:
    """PEFT's forward, unless the one adapter is switched off or merged."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters or self.merged or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        [adapter] = self.lora_A.keys()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return self.add_up(x, self.get_base_layer(), a, b, self.scaling[adapter])


class _FusedLinear(_FusedForward, Linear):
    @staticmethod
    def add_up(x: Tensor, base: nn.Linear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        bias = None if base.bias is None else base.bias.to(x.dtype)
        output = nn.functional.linear(x, base.weight.to(x.dtype), bias).flatten(0, -2)
        inner = nn.functional.linear(x, a.to(x.dtype)).flatten(0, -2)
        return torch.addmm(output, inner, (b * scaling).to(x.dtype).t()).view(*x.shape[:-1], -1)


class _FusedLinear4bit(_FusedForward, Linear4bit):
    @staticmethod
    def add_up(x: Tensor, base: Any, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        state = base.weight.quant_state
        packed = (base.weight, state.absmax, state.state2.absmax, state.state2.code, state.offset)
        output: Tensor = _LoraLinear.apply(x, base.bias, a, b, scaling, state.shape[0], *packed)
        return output


class _LoraLinear(torch.autograd.Function):
    """x W' + bias + scaling (x A') B' for a weight W (outputs, inputs) in NF4.

    `packed` is W and what unpacks it: scales in 8 bits, their own scales, code book and offset.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        outputs: int,
        *packed: Tensor,
    ) -> Tensor:
        output: Tensor
        output, inner = torch.ops.tamis.lora_linear.default(x, bias, a, b, scaling, outputs, *packed)
        ctx.save_for_backward(x, inner, a, b, *packed)
        ctx.scaling, ctx.outputs = scaling, outputs
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, inner, a, b, *packed = ctx.saved_tensors
        of_x, of_a, of_b = torch.ops.tamis.lora_linear_backward.default(
            gradient, x, inner, a, b, ctx.scaling, ctx.outputs, *packed
        )
        return of_x, None, of_a, of_b, None, None, *(None for _ in packed)


def _forward(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, outputs: int, *packed: Tensor
) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    output = nn.functional.linear(rows, _unpack(packed, [outputs, x.shape[-1]], x.dtype), bias)
    inner = rows @ a.to(x.dtype).t()
    output.addmm_(inner, (b * scaling).to(x.dtype).t())
    return output.view(*x.shape[:-1], outputs), inner


def _backward(
    gradient: Tensor, x: Tensor, inner: Tensor, a: Tensor, b: Tensor, scaling: float, outputs: int, *packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, above = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, outputs)
    of_inner = above @ (b * scaling).to(x.dtype)
    of_x = above @ _unpack(packed, [outputs, x.shape[-1]], x.dtype)
    of_x.addmm_(of_inner, a.to(x.dtype))
    of_a = of_inner.t() @ rows
    of_b = above.t() @ inner
    return of_x.view(x.shape), of_a.to(a.dtype), of_b.to(b.dtype) * scaling


def _unpack(packed: tuple[Tensor, ...], shape: list[int], dtype: torch.dtype) -> Tensor:
    weight, absmax, nested_absmax, nested_code, offset = packed
    scales = torch.ops.bitsandbytes.dequantize_blockwise.default(
        absmax, nested_absmax, nested_code, _NESTED_BLOCK, torch.float32
    )
    matrix: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight, scales + offset, _BLOCK, "nf4", shape, dtype
    )
    return matrix


_PACKED = "Tensor weight, Tensor absmax, Tensor nested_absmax, Tensor nested_code, Tensor offset"
_LIBRARY = torch.library.Library("tamis", "DEF")
_LIBRARY.define(
    f"lora_linear(Tensor x, Tensor? bias, Tensor a, Tensor b, float scaling, int outputs, {_PACKED}) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_linear_backward(Tensor gradient, Tensor x, Tensor inner, Tensor a, Tensor b, float scaling, int outputs, "
    f"{_PACKED}) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("lora_linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("lora_linear_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("tamis::lora_linear")
def _(
    x: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float, outputs: int, *packed: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*x.shape[:-1], outputs), x.new_empty(x.numel() // x.shape[-1], a.shape[0])


@torch.library.register_fake("tamis::lora_linear_backward")
def _(
    gradient: Tensor, x: Tensor, inner: Tensor, a: Tensor, b: Tensor, scaling: float, outputs: int, *packed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(a), torch.empty_like(b)
