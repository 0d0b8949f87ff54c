"""The model as a table: its layers by part and kind, what holds them in how many bits, and what of them is trained."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from tasks.training.families import Part, Parts, parts_of
from tasks.training.model import is_four_bit

PARTS: tuple[Part, ...] = get_args(Part)
OTHER = "(other weights)"
_COPY = re.compile(r"\.(original_module|modules_to_save\.\w+)")
"""What PEFT puts into the names of a module that is trained in full beside LoRA, and of its copy."""


@dataclass(frozen=True)
class ModuleRow:
    """All layers of one part of the model that have the same name, class and dtype.

    `module` is the last part of their names, or `OTHER` for what is no linear layer; `kind` the class that holds the
    weights, inside of LoRA and clipping. Counted are `layers`, their `weights`, how many are `adapted` by LoRA, LoRA's
    own weights, and the layers' own weights that are trained. `clipping` is kept, bypassed, or empty without any.
    """

    part: Part
    module: str
    kind: str
    dtype: str
    four_bit: bool
    layers: int
    weights: int
    bytes: int
    adapted: int
    adapter_weights: int
    trained_weights: int
    clipping: str


def module_table(model: PreTrainedModel) -> list[ModuleRow]:
    """Return the layers of a model, with or without LoRA in it, by part, name, class and dtype."""
    groups: dict[tuple[object, ...], list[ModuleRow]] = defaultdict(list)
    for row in _layers(model):
        key = (PARTS.index(row.part), row.module == OTHER, row.module, row.kind, row.dtype, row.clipping)
        groups[key].append(row)
    return [_total(groups[key]) for key in sorted(groups, key=str)]


def _layers(model: PreTrainedModel) -> Iterator[ModuleRow]:
    parts = parts_of(model)
    inside_lora = ""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if inside_lora and name.startswith(inside_lora):
            continue
        if isinstance(module, LoraLayer):
            inside_lora = f"{name}."
        own = [weight for weight in _weights(module) if id(weight) not in seen]  # tied weights count once
        seen.update(map(id, own))
        is_linear = isinstance(module, LoraLayer | nn.Linear)
        if own or is_linear:
            yield _row(model, parts, name, module, own)


def _weights(module: nn.Module) -> list[nn.Parameter]:
    holder = module.get_base_layer() if isinstance(module, LoraLayer) else module
    return list(holder.parameters(recurse=isinstance(module, LoraLayer)))


def _row(model: PreTrainedModel, parts: Parts, name: str, module: nn.Module, own: list[nn.Parameter]) -> ModuleRow:
    holder = module.get_base_layer() if isinstance(module, LoraLayer) else module
    outer, _, last = name.rpartition(".")
    shown = _COPY.sub("", name).rpartition(".")[2]
    around = model.get_submodule(outer) if outer else model
    clipping = ""
    if getattr(around, "use_clipped_linears", None) is not None and last == "linear":
        shown = outer.rpartition(".")[2]
        clipping = "kept" if around.use_clipped_linears else ""
    elif getattr(holder, "use_clipped_linears", False):
        clipping = "bypassed"  # LoRA stands beside the clipping layer as a whole, so its part is not clipped
    four_bit = is_four_bit(holder)
    first = next(iter(holder.parameters()), None)
    adapter = _adapter_weights(module)
    return ModuleRow(
        part=parts.of(name),
        module=shown if isinstance(module, LoraLayer | nn.Linear) else OTHER,
        kind=type(holder).__name__ if isinstance(module, LoraLayer | nn.Linear) else "",
        dtype="4-bit" if four_bit else str(first.dtype if first is not None else "").removeprefix("torch."),
        four_bit=four_bit,
        layers=1,
        weights=sum(weight.numel() * (2 if four_bit else 1) for weight in own),  # two weights a byte
        bytes=sum(weight.numel() * weight.element_size() for weight in own),
        adapted=int(isinstance(module, LoraLayer)),
        adapter_weights=adapter,
        trained_weights=sum(weight.numel() for weight in own if weight.requires_grad),
        clipping=clipping,
    )


def _adapter_weights(module: nn.Module) -> int:
    if not isinstance(module, LoraLayer):
        return 0
    base = set(map(id, module.get_base_layer().parameters()))
    return sum(weight.numel() for weight in module.parameters() if id(weight) not in base)


def _total(rows: list[ModuleRow]) -> ModuleRow:
    counted = ("layers", "weights", "bytes", "adapted", "adapter_weights", "trained_weights")
    return replace(rows[0], **{name: sum(getattr(row, name) for row in rows) for name in counted})
