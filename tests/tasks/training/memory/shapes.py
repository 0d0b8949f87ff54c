"""Configurations of Gemma 4 models, as Google's converter writes them."""

from transformers import Gemma4AudioConfig, Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig

GIB = 2**30


def gemma_31b(layers: int = 60, *, parts: int = 1) -> Gemma4Config:
    """Gemma 4 31B, or one with fewer layers (a multiple of 6) and a language model of its width / `parts`."""
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
    return Gemma4Config(text_config=text, vision_config=vision, audio_config=None)


def gemma_e4b() -> Gemma4Config:
    """Gemma 4 E4B: layers that share keys and values, and embeddings for each layer."""
    text = Gemma4TextConfig(
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=42,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 7,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_kv_shared_layers=18,
        hidden_size_per_layer_input=256,
    )
    return Gemma4Config(text_config=text, vision_config=_small_vision(), audio_config=Gemma4AudioConfig())


def gemma_e2b() -> Gemma4Config:
    """Gemma 4 E2B: as E4B, with wider feed-forward layers where keys and values are shared."""
    text = Gemma4TextConfig(
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 7,
        num_attention_heads=8,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=256,
    )
    return Gemma4Config(text_config=text, vision_config=_small_vision(), audio_config=Gemma4AudioConfig())


def _small_vision() -> Gemma4VisionConfig:
    return Gemma4VisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
        use_clipped_linears=True,
    )
