"""Towers of other families are rehearsed too, whatever their images are to them."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from tasks.training.memory.skeleton import Skeleton

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {"hidden_size": 64, "intermediate_size": 64}
SQUARE = {**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", **SQUARE},
        "text_config": {"model_type": "llama", **TEXT, "vocab_size": 64},
    },
    "qwen2_5_vl": {
        "vision_config": {**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
        "text_config": {**TEXT, "num_key_value_heads": 1, "vocab_size": 64, "rope_parameters": ROPE},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vision_tower_keeps_activations_only_if_it_is_trained(family: str) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    skeleton = Skeleton(model, four_bit=False, dtype=torch.bfloat16)
    size = {"batch": 2, "tokens": 64, "images": 2, "image_tokens": 16}
    trained = skeleton.stack(**size)
    assert [layer.vision for layer in trained.layers] == [True, True, False, False]
    assert all(layer.footprint.kept > 0 and layer.gradients > 0 for layer in trained.layers)

    assert skeleton.vision is not None
    skeleton.vision.requires_grad_(False)
    frozen = skeleton.stack(**size)
    assert [layer.vision for layer in frozen.layers] == [False, False]
    assert 0 < frozen.frozen_vision < trained.layers[0].footprint.kept
