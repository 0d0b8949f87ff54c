"""Make the tiny Gemma 4 that ships with the sample: configuration, tokenizer, processor, pretraining on captions.

It has the 31B model's wiring (sliding and full layers, keys as values in the full ones, image tokens that see each
other, capped logits) at a size that two CPU cores can fine-tune, and it learns to caption scenes, nothing else.

    python -m tasks.sample_models.make_gemma --out tasks/sample_models/gemma
"""

import argparse
import json
import logging
import multiprocessing
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4TextConfig,
    Gemma4VideoProcessor,
    Gemma4VisionConfig,
    GemmaTokenizer,
    GenerationConfig,
    get_cosine_schedule_with_warmup,
)

from tasks.curation.scene import describe, draw_scene
from tasks.sample_models.gemma_scenes import (
    CAPTION_PROMPTS,
    PATCH,
    POOLING,
    SHORT_CAPTION_PROMPTS,
    SOFT_TOKENS,
    SceneCache,
    make_batch,
)

log = logging.getLogger(__name__)

CHAT_TEMPLATE = Path(__file__).parents[1] / "training" / "templates" / "gemma4.jinja"

# Gemma 4's own names and spellings, so that code written for the real tokenizer finds them here.
BASIC_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
CONTROL_TOKENS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "soc_token": "<|channel>",
    "eoc_token": "<channel|>",
    "think_token": "<|think|>",
    "escape_token": '<|"|>',
    "str_token": "<|tool_response>",
    "etr_token": "<tool_response|>",
    "stc_token": "<|tool_call>",
    "etc_token": "<tool_call|>",
    "std_token": "<|tool>",
    "etd_token": "<tool|>",
}
VIDEO_TOKEN = "<|video|>"  # Gemma4Processor adds it by itself; in the vocabulary already, it grows nothing
VOCABULARY = 1024  # at most: the captions need fewer

# Further questions that the tokenizer should not have to spell.
OTHER_PROMPTS = (
    "Which object is largest? Answer with its colour and shape.",
    "How many objects are there? Answer with a number, yes or no.",
    "Where is the smallest object? Which side of the picture is it on?",
)


def train_tokenizer(texts: Sequence[str]) -> GemmaTokenizer:
    """Train Gemma's kind of tokenizer (BPE, byte fallback, "▁" for a space) on `texts`."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    # Merges stay within words, so that GemmaTokenizer, which does not split into words, applies them alike.
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|[^A-Za-z]"), "isolated")
    trained.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[*BASIC_TOKENS, *CONTROL_TOKENS.values(), VIDEO_TOKEN, *bytes_],
            initial_alphabet=["\n", "▁", *map(chr, range(ord("!"), ord("~") + 1))],
            show_progress=False,
        ),
    )
    bpe = json.loads(trained.to_str())["model"]
    return GemmaTokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(pair) for pair in bpe["merges"]],  # type: ignore[misc]
        add_bos_token=False,
        padding_side="left",
        extra_special_tokens=CONTROL_TOKENS,
        model_max_length=2048,
    )


def _tokenizer_texts() -> Iterator[str]:
    rng = random.Random("gemma tokenizer")
    for prompt in [*CAPTION_PROMPTS, *SHORT_CAPTION_PROMPTS, *OTHER_PROMPTS] * 1000:
        scene = draw_scene(rng)
        yield f"system\nuser\n{prompt}\nmodel\n{scene.answer}\n{describe(scene, rng)}"


def build_processor(tokenizer: GemmaTokenizer) -> Gemma4Processor:
    """Build a Gemma 4 processor around `tokenizer`, with the fewest image tokens it allows and our chat template."""
    image: dict[str, Any] = {"max_soft_tokens": SOFT_TOKENS, "pooling_kernel_size": POOLING, "patch_size": PATCH}
    return Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(**image),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(**image),
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        image_seq_length=SOFT_TOKENS,
    )


TEXT: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "sliding_window": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 2048,
    "initializer_range": 0.06,
}
VISION: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 24,
    "patch_size": PATCH,
    "pooling_kernel_size": POOLING,
    "position_embedding_size": SOFT_TOKENS * POOLING,
    "initializer_range": 0.06,
}


def build_model(tokenizer: GemmaTokenizer) -> Gemma4ForConditionalGeneration:
    """Build the untrained model for `tokenizer`, in float32."""
    token: Any = tokenizer.convert_tokens_to_ids
    config: dict[str, Any] = {
        "text_config": Gemma4TextConfig(vocab_size=len(tokenizer), **TEXT),
        "vision_config": Gemma4VisionConfig(**VISION),
        "audio_config": None,
        "initializer_range": 0.06,
        "image_token_id": token("<|image|>"),
        "boi_token_id": token("<|image>"),
        "eoi_token_id": token("<image|>"),
        "video_token_id": token(VIDEO_TOKEN),
        "audio_token_id": token("<|audio|>"),
        "boa_token_id": token("<|audio>"),
        "eoa_token_index": token("<audio|>"),
    }
    model = Gemma4ForConditionalGeneration(Gemma4Config(**config))
    model.generation_config = GenerationConfig(
        bos_token_id=token("<bos>"), pad_token_id=token("<pad>"), eos_token_id=[token("<eos>"), token("<turn|>")]
    )
    with torch.no_grad():
        torch.nn.init.normal_(model.model.vision_tower.patch_embedder.position_embedding_table, std=0.06)
        for name, weight in model.named_parameters():
            # Attention is unscaled between normalised queries and keys: start it soft, or a small model stays stuck.
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(weight.numel() ** -0.25)
    return model


def _row_batches(rows: int, batch: int, device: str) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(rows, device=device)[: rows // batch * batch].view(-1, batch)


def pretrain(
    model: Gemma4ForConditionalGeneration, cache: SceneCache, *, steps: int, batch: int, learning_rate: float
) -> float:
    """Train every weight of `model` to caption the cached scenes.

    Returns the loss per caption token on the cache's last `batch` scenes, which are held out.
    """
    device = model.device.type
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device == "cuda"
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20 + 1, steps)
    held_out = torch.arange(len(cache) - batch, len(cache), device=device)
    batches = _row_batches(len(cache) - batch, batch, device)
    precision = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
    model.train()
    for step in range(1, steps + 1):
        with precision:
            loss = model(**make_batch(cache, next(batches), model.config)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            log.info("step %d of %d: loss %.4f", step, steps, loss.item())
    model.eval()
    with torch.no_grad(), precision:
        return float(model(**make_batch(cache, held_out, model.config)).loss)


def main() -> None:
    """Make the model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--scenes", type=int, default=80_000)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.manual_seed(0)

    tokenizer = train_tokenizer(list(_tokenizer_texts()))
    build_processor(tokenizer).save_pretrained(args.out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(tokenizer).to(device)  # type: ignore[arg-type]
    log.info("%.2f M parameters", model.num_parameters() / 1e6)
    with tempfile.TemporaryDirectory() as folder:
        cache = SceneCache.render(
            Path(folder), processor_path=args.out, scenes=args.scenes, seed="gemma pretraining", workers=args.workers
        )
        loss = pretrain(model, cache.to(device), steps=args.steps, batch=args.batch, learning_rate=args.learning_rate)
    log.info("held-out loss %.4f", loss)
    model.to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
