"""Gemma 4 models of the published sizes with random weights, made in GPU memory.

Memory and speed depend on shapes alone; the sample's tokenizer and processor stand in for Gemma's own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AutoHfQuantizer

from tasks.training.model import decoder_name

SAMPLE = Path("tasks/sample_models/gemma")
STD = 0.02


def gemma4_31b(layers: int = 60, *, parts: int = 1) -> Gemma4Config:
    """Gemma 4 31B with its first `layers` decoder layers, a multiple of 6, and the language model's width / `parts`."""
    text = Gemma4TextConfig(
        hidden_size=5376 // parts,
        intermediate_size=21504 // parts,
        num_hidden_layers=layers,
        num_attention_heads=32 // parts,
        num_key_value_heads=16 // parts,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=4 // parts,
        attention_k_eq_v=True,
        use_bidirectional_attention="vision",
        hidden_size_per_layer_input=0,
        sliding_window=1024,
        final_logit_softcapping=30.0,
    )
    vision = Gemma4VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=72,
        standardize=True,
    )
    return _with_sample_tokens(text, vision)


def gemma4_half(layers: int = 60) -> Gemma4Config:
    """Half as wide as the 31B: with 24 layers, one 80 GB GPU has room to train 3.6 B weights of it in full."""
    return gemma4_31b(layers, parts=2)


def gemma4_e4b() -> Gemma4Config:
    """Gemma 4 E4B without its audio tower."""
    return _edge(hidden=2560, intermediate=10240, layers=42, every=6, kv_heads=2, kv_shared=18, double_wide=False)


def gemma4_e2b() -> Gemma4Config:
    """Gemma 4 E2B without its audio tower."""
    return _edge(hidden=1536, intermediate=6144, layers=35, every=5, kv_heads=1, kv_shared=20, double_wide=True)


SHAPES: dict[str, Callable[[], Gemma4Config]] = {"31B": gemma4_31b, "E4B": gemma4_e4b, "E2B": gemma4_e2b}


def _edge(
    *, hidden: int, intermediate: int, layers: int, every: int, kv_heads: int, kv_shared: int, double_wide: bool
) -> Gemma4Config:
    text = Gemma4TextConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=256,
        global_head_dim=512,
        layer_types=["full_attention" if at % every == every - 1 else "sliding_attention" for at in range(layers)],
        num_kv_shared_layers=kv_shared,
        hidden_size_per_layer_input=256,
        use_double_wide_mlp=double_wide,
        sliding_window=512,
        final_logit_softcapping=30.0,
    )
    return _with_sample_tokens(text, Gemma4VisionConfig(use_clipped_linears=True))


def _with_sample_tokens(text: Gemma4TextConfig, vision: Gemma4VisionConfig) -> Gemma4Config:
    sample = json.loads((SAMPLE / "config.json").read_text())
    tokens = {name: value for name, value in sample.items() if "token" in name and value is not None}
    return Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)


def write_processor(folder: Path, config: Gemma4Config) -> Path:
    """Write the sample's processor with the configuration's pooling of patches, and the configuration."""
    processor = AutoProcessor.from_pretrained(SAMPLE)
    processor.image_processor.pooling_kernel_size = config.vision_config.pooling_kernel_size
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def random_model(
    config: Gemma4Config,
    *,
    four_bit: bool,
    device: str | torch.device = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    storage: torch.dtype = torch.uint8,
) -> PreTrainedModel:
    """Make a model in `dtype`; if `four_bit`, its decoder's linears in NF4, doubly quantised, packed in `storage`."""
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config, dtype=dtype)
    torch.manual_seed(0)
    decoder = decoder_name(model) + "."
    for name, module in list(model.named_modules()):
        if four_bit and isinstance(module, nn.Linear) and name.startswith(decoder):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _packed(module, device, storage))
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                module.register_parameter(name, _random(weight, module, device))
    model.tie_weights()
    model.generation_config = GenerationConfig.from_pretrained(SAMPLE)
    model.to(device)
    if four_bit:
        _mark_quantized(model)
    return model


def _mark_quantized(model: Any) -> None:
    """Say what loading a quantized model would have said, for the libraries that ask."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model.hf_quantizer = AutoHfQuantizer.from_config(config)
    model.config.quantization_config = config
    model.is_quantized = model.is_loaded_in_4bit = True


def _packed(linear: nn.Linear, device: str | torch.device, storage: torch.dtype) -> Linear4bit:
    packed = Linear4bit(
        *(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype, True, "nf4"),
        quant_storage=storage,
        device="meta",
    )
    packed.weight = Params4bit(
        _normal(linear.weight, device),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
        quant_storage=storage,
        module=packed,
    )
    return packed.to(device)


def _random(weight: nn.Parameter, module: nn.Module, device: str | torch.device) -> nn.Parameter:
    value = torch.ones_like(weight, device=device) if "Norm" in type(module).__name__ else _normal(weight, device)
    return nn.Parameter(value, requires_grad=weight.requires_grad)


def _normal(weight: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    return torch.randn(weight.shape, dtype=weight.dtype, device=device).mul_(STD)


def tiny(_: Any = None) -> Gemma4Config:
    """The sample's own configuration, to try a script without a GPU."""
    return Gemma4Config.from_pretrained(SAMPLE)
