"""Attention of wide heads against transformers' own, in values and gradients."""

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tasks.training.attention import attend


class Layer(nn.Module):
    num_key_value_groups = 4
    is_causal = True


def tensors(width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 8, 24, width), (2, 2, 24, width), (2, 2, 24, width)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def padded_mask() -> Tensor:
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    mask[1, :, :, 20:] = False
    return mask


@pytest.mark.parametrize("width", [64, 320])
@pytest.mark.parametrize("mask", [None, padded_mask()], ids=["causal", "padded"])
def test_outputs_and_gradients_are_those_of_sdpa(width: int, mask: Tensor | None) -> None:
    ours, theirs = tensors(width), tensors(width)
    found, _ = attend(Layer(), *ours, mask, scaling=0.05)
    wanted, _ = sdpa_attention_forward(Layer(), *theirs, mask, scaling=0.05)
    assert wanted is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    (found**2).sum().backward()
    (wanted**2).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)
