"""Tiny random models of every family with tokenizers and processors built from nothing, so no test needs a download."""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedProcessor,
    Gemma4UnifiedVideoProcessor,
    Gemma4VideoProcessor,
    GenerationConfig,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tasks.sample_models.make_gemma import CONTROL_TOKENS

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
VISION = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}

# LLaVA's own wording, which leaves <s> and </s> to others.
LLAVA_STOCK = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() }}: {% endif %}"
    "{% for c in m.content if c.type == 'image' %}<image>\n{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def stock_template(name: str) -> str:
    """A chat template as the model's makers ship it, of those that TRL keeps."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_of(
    *, eos: str, bos: str | None = None, named: dict[str, str] | None = None, others: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and of the special tokens; `named` ones become its attributes."""
    special = [token for token in dict.fromkeys(["<pad>", eos, bos, *(named or {}).values(), *others]) if token]
    vocabulary = {symbol: at for at, symbol in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=named or {},
        additional_special_tokens=list(others),
    )


def write(name: str, folder: Path) -> Path:
    """Write the model and the processor `name` of `MODELS` into `folder`, as a model's makers would."""
    processor, config, stop = MODELS[name]()
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1 and not weight.any():  # zeros would hide from the loss what lies behind them
            torch.nn.init.normal_(weight.data, std=0.1)
    tokenizer = processor.tokenizer
    ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(stop)]
    model.generation_config = GenerationConfig(eos_token_id=ids, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def config_of(model_type: str, **fields: Any) -> PreTrainedConfig:
    """A configuration from plain fields, as from a config.json."""
    return AutoConfig.for_model(model_type, **fields)


Built = tuple[ProcessorMixin, PreTrainedConfig, str]


def _gemma4_tokenizer() -> PreTrainedTokenizerFast:
    return tokenizer_of(eos="<eos>", bos="<bos>", named=CONTROL_TOKENS, others=("<|video|>",))


def _gemma4_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    token: Any = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token("<|image|>"),
        "boi_token_id": token("<|image>"),
        "eoi_token_id": token("<image|>"),
        "video_token_id": token("<|video|>"),
        "audio_token_id": token("<|audio|>"),
        "boa_token_id": token("<|audio>"),
        "eoa_token_index": token("<audio|>"),
    }


def _gemma4(text: dict[str, Any], *, clipped: bool, audio: bool, template: str) -> Built:
    tokenizer = _gemma4_tokenizer()
    patches: dict[str, Any] = {"max_soft_tokens": 70, "pooling_kernel_size": 3, "patch_size": 4}
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(**patches),
        chat_template=stock_template(template),
        image_seq_length=70,
    )
    vision = {"num_key_value_heads": 2, "head_dim": 32, "patch_size": 4, "pooling_kernel_size": 3}
    vision |= {"position_embedding_size": 210, "use_clipped_linears": clipped}
    sound = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 64}
    config = config_of(
        "gemma4",
        text_config={**TEXT, "vocab_size": len(tokenizer), "sliding_window": 128, "global_head_dim": 32, **text},
        vision_config={**VISION, **vision},
        audio_config={**sound, "subsampling_conv_channels": (8, 4)} if audio else None,
        **_gemma4_ids(tokenizer),
    )
    return processor, config, "<turn|>"


def gemma4_edge() -> Built:
    """E2B and E4B: layers that share keys and values, per-layer embeddings, clipped vision linears, audio."""
    text = {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": len(_gemma4_tokenizer()),
    }
    return _gemma4(text, clipped=True, audio=True, template="gemma4_v5")


def gemma4_dense() -> Built:
    """31B: keys as values in full layers, image tokens that see each other, no audio; the released chat template."""
    text = {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
        "hidden_size_per_layer_input": 0,
    }
    return _gemma4(text, clipped=False, audio=False, template="gemma4_v2")


def gemma4_unified() -> Built:
    """12B: patches go into the language model without a vision tower."""
    tokenizer = _gemma4_tokenizer()
    patches: dict[str, Any] = {"max_soft_tokens": 70, "pooling_kernel_size": 3, "patch_size": 4}
    processor = Gemma4UnifiedProcessor(
        feature_extractor=Gemma4UnifiedAudioFeatureExtractor(),
        image_processor=Gemma4UnifiedImageProcessor(**patches),
        tokenizer=tokenizer,
        video_processor=Gemma4UnifiedVideoProcessor(**patches),
        chat_template=stock_template("gemma4_v5"),
        image_seq_length=70,
    )
    text = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128, "global_head_dim": 32}
    config = config_of(
        "gemma4_unified",
        text_config={**TEXT, "vocab_size": len(tokenizer), "use_bidirectional_attention": "vision", **text},
        vision_config={"patch_size": 4, "pooling_kernel_size": 3, "mm_embed_dim": 64, "output_proj_dims": 64},
        audio_config={"audio_embed_dim": 64},
        **_gemma4_ids(tokenizer),
    )
    return processor, config, "<turn|>"


def gemma3() -> Built:
    """Gemma 3: a SigLIP tower, the same number of tokens for every image."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = ("<start_of_turn>", "<end_of_turn>")
    tokenizer = tokenizer_of(eos="<eos>", bos="<bos>", named=named, others=turns)
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        chat_template=stock_template("gemma3"),
        image_seq_length=16,
    )
    config = config_of(
        "gemma3",
        text_config={**TEXT, "vocab_size": len(tokenizer), "sliding_window": 128},
        vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=16,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return processor, config, "<end_of_turn>"


def _llava(vision: str, text: str) -> Built:
    tokenizer = tokenizer_of(eos="</s>", bos="<s>", others=("<image>",))
    clip = vision == "clip_vision_model"
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default" if clip else "full",
        num_additional_image_tokens=1 if clip else 0,
        chat_template=LLAVA_STOCK,
    )
    config = config_of(
        "llava",
        text_config={**TEXT, "model_type": text, "vocab_size": len(tokenizer)},
        vision_config={**VISION, "model_type": vision, "image_size": 32, "patch_size": 8},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2 if clip else -1,
        vision_feature_select_strategy="default" if clip else "full",
    )
    return processor, config, "</s>"


QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    token: Any = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def qwen2_5_vl() -> Built:
    """Qwen2.5-VL: the projector sits inside the vision tower, tokens follow the image's pixels."""
    tokenizer = tokenizer_of(eos="<|endoftext|>", others=QWEN_TOKENS)
    pixels: dict[str, Any] = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 16}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=stock_template("qwen2_5_vl"),
    )
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    vision = {"hidden_size": 64, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    config = config_of(
        "qwen2_5_vl",
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        **_qwen_ids(tokenizer),
    )
    return processor, config, "<|im_end|>"


def qwen3_vl() -> Built:
    """Qwen3-VL: as Qwen2.5-VL, with further projectors that feed the first decoder layers."""
    tokenizer = tokenizer_of(eos="<|endoftext|>", others=(*QWEN_TOKENS, "<tool_call>", "</tool_call>"))
    pixels: dict[str, Any] = {"min_pixels": 32 * 32, "max_pixels": 32 * 32 * 16, "patch_size": 16}
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=16),
        chat_template=stock_template("qwen3_vl"),
    )
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {"hidden_size": 64, "intermediate_size": 64, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    config = config_of(
        "qwen3_vl",
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config={**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 64},
        **_qwen_ids(tokenizer),
    )
    return processor, config, "<|im_end|>"


def _smolvlm(model_type: str) -> Built:
    rows = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    others = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>", *rows)
    tokenizer = tokenizer_of(eos="<end_of_utterance>", bos=None, others=others)
    processor = Idefics3Processor(  # SmolVLM's own needs a package for videos, and treats images alike
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=stock_template("smolvlm"),
    )
    config = config_of(
        model_type,
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return processor, config, "<end_of_utterance>"


MODELS: dict[str, Callable[[], Built]] = {
    "gemma4 edge": gemma4_edge,
    "gemma4 dense": gemma4_dense,
    "gemma4 unified": gemma4_unified,
    "gemma3": gemma3,
    "llava clip llama": lambda: _llava("clip_vision_model", "llama"),
    "llava siglip qwen2": lambda: _llava("siglip_vision_model", "qwen2"),
    "llava clip gemma": lambda: _llava("clip_vision_model", "gemma"),
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
    "smolvlm": lambda: _smolvlm("smolvlm"),
    "idefics3": lambda: _smolvlm("idefics3"),
}
