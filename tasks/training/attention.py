"""Attention for heads wider than the fused kernels take, by plain matrix products where sequences are short.

For the 512-wide heads of Gemma 4's full layers, PyTorch falls back to a kernel whose backward pass is several times
slower than two matrix products and a softmax; up to a thousand tokens, their scores take little memory.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "tamis"
WIDEST_FUSED_HEAD = 256
LONGEST = 1024


def use_short_attention(decoder: PreTrainedModel) -> bool:
    """Let `decoder` use this attention if some of its heads are too wide for the fused kernels; return whether."""
    if not any(getattr(module, "head_dim", 0) > WIDEST_FUSED_HEAD for module in decoder.modules()):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    decoder.set_attn_implementation(NAME)
    return True


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output (batch, tokens, heads, width) as transformers' `sdpa` would, and no weights.

    `query` is (batch, heads, tokens, width); `key` and `value` may have fewer heads. `attention_mask` is True where a
    token may look, (batch, 1, tokens, keys); None means causal.
    """
    batch, heads, tokens, width = query.shape
    kv_heads, keys = key.shape[1:3]
    if width <= WIDEST_FUSED_HEAD or keys > LONGEST or dropout:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output, None
    if attention_mask is None:
        attention_mask = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
    together = (batch, kv_heads, heads // kv_heads * tokens)  # heads that share keys are rows of one product
    scores = (query.reshape(*together, width) @ key.transpose(2, 3)).view(batch, heads, tokens, keys)
    scores = scores.float() * (width**-0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min).softmax(-1).to(query.dtype)
    output = (weights.view(*together, keys) @ value).view(batch, heads, tokens, width)
    return output.transpose(1, 2).contiguous(), None
