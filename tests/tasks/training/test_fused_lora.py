"""Fused LoRA linears against PEFT's own forward and backward, plain and in 4 bits."""

import copy
from collections.abc import Callable

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tasks.training.fused_lora import fuse_lora


class Pair(nn.Module):
    """Two linears of which one has a bias, and whose sizes differ."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 192, bias=True)
        self.down = nn.Linear(192, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def quantize(linear: nn.Linear) -> Linear4bit:
    packed = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, torch.float32, True, "nf4")
    packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
    packed.bias = linear.bias
    return packed.to("cpu")


def plain() -> Pair:
    torch.manual_seed(0)
    return Pair()


def four_bit() -> Pair:
    pair = plain()
    pair.up, pair.down = quantize(pair.up), quantize(pair.down)
    pair.is_loaded_in_4bit = True  # by which PEFT knows
    return pair


def adapted(base: nn.Module, **options: object) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=24, target_modules=["up", "down"], **options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)  # zero at first, which would hide A's gradient
    return model


def outcome(model: Callable[[Tensor], Tensor], weights: PeftModel) -> dict[str, Tensor]:
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    output = model(x)
    (output**2).sum().backward()
    found = {"output": output.detach(), "input": x.grad}
    return found | {name: weight.grad for name, weight in weights.named_parameters() if weight.requires_grad}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("base", [plain, four_bit])
def test_outputs_and_gradients_are_peft_s(base: Callable[[], Pair]) -> None:
    theirs, ours = adapted(base()), adapted(base())
    assert fuse_lora(ours) == 2
    assert_same(outcome(ours, ours), outcome(theirs, theirs))


@pytest.mark.parametrize("base", [plain, four_bit])
def test_they_are_so_when_compiled_and_checkpointed(base: Callable[[], Pair]) -> None:
    theirs, ours = adapted(base()), adapted(base())
    fuse_lora(ours)

    def checkpointed(x: Tensor) -> Tensor:
        result: Tensor = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
        return result

    assert_same(outcome(torch.compile(checkpointed, backend="aot_eager"), ours), outcome(theirs, theirs))


def test_four_bit_weights_are_not_kept_unpacked_for_the_backward_pass() -> None:
    model = adapted(four_bit())
    fuse_lora(model)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        torch.compile(model, backend="aot_eager")(torch.randn(3, 5, 64))
    assert max(kept) < 64 * 192


def test_switching_the_adapter_off_gives_the_base() -> None:
    base = four_bit()
    wanted = copy.deepcopy(base)(torch.ones(1, 64))
    model = adapted(base)
    fuse_lora(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(torch.ones(1, 64)), wanted)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_plain_lora_is_left_to_peft(options: dict[str, object]) -> None:
    assert fuse_lora(adapted(plain(), **options)) == 0
