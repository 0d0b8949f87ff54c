"""Train the small CLIP in `tasks/sample_models/clip/`, the offline sample's default for image–text scores.

    python -m tasks.sample_models.make_clip --images 120000 --steps 5000 --out tasks/sample_models/clip

The result is an ordinary open_clip folder (`local-dir:…`): configuration, f16 weights and a tokenizer.
"""

import argparse
import io
import json
import logging
import multiprocessing
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional

from tasks.curation.sample_images import draw_everyday_format, draw_size, encode, is_achromatic
from tasks.curation.scene import Scene, describe, draw_scene, draw_unlike, render

log = logging.getLogger(__name__)

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 2, 1], "width": 16},  # a list of layers means a ResNet
    "text_cfg": {
        "hf_tokenizer_name": "local",  # open_clip reads the tokenizer from the folder whenever a name is given
        "context_length": 40,
        "vocab_size": 512,
        "width": 96,
        "heads": 3,
        "layers": 2,
        "pool_type": "eos",
        "eos_id": 2,
    },
}
# Squashed, not cropped: what a caption says is on the left must stay in the picture.
PREPROCESS_CONFIG = {"resize_mode": "squash", "interpolation": "bicubic"}
BOUNDARY = 0.28
"""The cosine that training puts between matched and mismatched pairs: the default policy's threshold."""

_SHARPNESS = 16.0
_PHRASINGS_PER_IMAGE = 4
_CHUNK = 250
_BATCH = 256
_PEAK_LEARNING_RATE = 2e-3
_FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX)


@dataclass(frozen=True)
class Separation:
    """How far matched pairs score above mismatched ones; precision and recall are of rejecting mismatches."""

    auc: float
    matched_low: float
    mismatched_high: float
    precision: float
    recall: float


def main() -> None:
    """Read the command line, train, save and print how well never-seen pairs separate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=120_000, help="pictures drawn to train on")
    parser.add_argument("--steps", type=int, default=5_000, help=f"optimizer steps of {_BATCH} pairs")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw pictures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger().setLevel(logging.WARNING)  # open_clip reports each step of loading
    log.setLevel(logging.INFO)

    arguments.out.mkdir(parents=True, exist_ok=True)
    write_configuration(arguments.out)
    with multiprocessing.Pool(arguments.workers) as pool:
        seeds = [f"clip {arguments.seed} {chunk}" for chunk in range(arguments.images // _CHUNK)]
        drawn = pool.imap(_draw_chunk, seeds)
        images, captions = _collect(drawn, arguments.out)
    log.info("drew %d images", len(images))
    model = train(images, captions, steps=arguments.steps, seed=arguments.seed)
    save_weights(model, arguments.out)
    log.info("%s", separation(arguments.out, pairs=600, seed=f"held out {arguments.seed}"))


def write_configuration(folder: Path) -> None:
    """Write `open_clip_config.json` and the tokenizer's two files to `folder`."""
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PREPROCESS_CONFIG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    _train_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "model_max_length": MODEL_CONFIG["text_cfg"]["context_length"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def _train_tokenizer() -> Tokenizer:
    """A byte-level BPE on captions: their words are single tokens and any other text still has some."""
    rng = random.Random("clip tokenizer")
    captions = [describe(draw_scene(rng), rng) for _ in range(5_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MODEL_CONFIG["text_cfg"]["vocab_size"],
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


def _draw_chunk(seed: str) -> tuple[np.ndarray, list[str]]:
    """Draw `_CHUNK` pictures as uint8 (chunk, 3, side, side) and, flat, `_PHRASINGS_PER_IMAGE` captions of each."""
    rng = random.Random(seed)
    side = MODEL_CONFIG["vision_cfg"]["image_size"]
    images = np.empty((_CHUNK, 3, side, side), dtype=np.uint8)
    captions = []
    for row in range(_CHUNK):
        scene = draw_scene(rng)
        width, height = draw_size(rng)
        # Most pictures are drawn small, which is many times faster and looks the same at the model's size.
        shrink = 1.0 if rng.random() < 0.05 else rng.uniform(0.35, 0.55)
        size = (round(width * shrink), round(height * shrink))
        image = _through_file(scene, size, rng).resize((side, side), rng.choice(_FILTERS))
        images[row] = np.asarray(image).transpose(2, 0, 1)
        captions += [describe(scene, rng) for _ in range(_PHRASINGS_PER_IMAGE)]
    return images, captions


def _through_file(scene: Scene, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Render, encode as the sample pool does, and decode to RGB."""
    image = render(scene, size=size, seed=rng.getrandbits(64))
    odd = ["cmyk", "exif_rotated", "palette", *(["grayscale"] if is_achromatic(scene) else [])]
    file_format = rng.choice(odd) if rng.random() < 0.08 else draw_everyday_format(rng)
    decoded = Image.open(io.BytesIO(encode(image, file_format=file_format, rng=rng).data))
    return ImageOps.exif_transpose(decoded).convert("RGB")


def _collect(drawn: Iterator[tuple[np.ndarray, list[str]]], folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All images, uint8 (n, 3, side, side), and captions, token ids (n, phrasings, context)."""
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    images, tokens = [], []
    for pixels, captions in drawn:
        images.append(torch.from_numpy(pixels))
        tokens.append(tokenize(captions).unflatten(0, (-1, _PHRASINGS_PER_IMAGE)).to(torch.int16))
    return torch.cat(images), torch.cat(tokens)


def train(images: torch.Tensor, captions: torch.Tensor, *, steps: int, seed: int) -> open_clip.CLIP:
    """Train a fresh model; the same arguments on the same device give nearly the same weights.

    `images` are uint8 (n, 3, side, side); `captions` are token ids (n, phrasings, context).
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, captions = images.to(device), captions.to(device)
    model = open_clip.CLIP(**MODEL_CONFIG).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, steps, pct_start=0.1)
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=device).view(3, 1, 1)
    batch = min(_BATCH, len(images))
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), device=device)
        phrasing = torch.randint(captions.shape[1], (batch,), device=device)
        pixels = ((images[rows].float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(captions[rows, phrasing].long(), normalize=True)
        loss = pair_loss(image.float() @ text.T, scale=model.logit_scale.exp())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 500 == 0 or step == steps - 1:
            log.info("step %d loss %.3f", step, loss.item())
    return model.eval().cpu()


def pair_loss(cosine: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
    """The loss of a square matrix of image–text cosines whose diagonal holds the matched pairs.

    CLIP's symmetric cross-entropy (Radford et al., 2021) ranks pairs; a sigmoid term (as in SigLIP, Zhai et al., 2023,
    here with a fixed bias) puts matched pairs above `BOUNDARY` and the others below, so that a score means the same
    whatever it is compared with.
    """
    labels = torch.arange(len(cosine), device=cosine.device)
    ranking = functional.cross_entropy(scale * cosine, labels) + functional.cross_entropy(scale * cosine.T, labels)
    margin = _SHARPNESS * (cosine - BOUNDARY)
    matched = functional.softplus(-margin.diagonal()).mean()
    others = functional.softplus(margin)
    mismatched = (others.sum() - others.diagonal().sum()) / (others.numel() - len(others))
    return ranking / 2 + matched + 4 * mismatched


def save_weights(model: open_clip.CLIP, folder: Path) -> None:
    """Write the weights as f16 safetensors, half the size; open_clip computes in f32 all the same."""
    weights = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")


def separation(folder: Path, *, pairs: int, seed: str) -> Separation:
    """Score `pairs` never-seen images, of the sample pool's sizes and formats, with their own and another's caption.

    The other caption is of a scene that shares no colour and no shape. `matched_low` and `mismatched_high` are
    the first percentile of matched and the 99th of mismatched cosines.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    rng = random.Random(seed)
    matched, mismatched = [], []
    for _ in range(pairs):
        scene = draw_scene(rng)
        captions = [describe(scene, rng), describe(draw_unlike(scene, rng), rng)]
        with torch.inference_mode():
            pixels = preprocess(_through_file(scene, draw_size(rng), rng)).unsqueeze(0)
            image = model.encode_image(pixels, normalize=True)
            text = model.encode_text(tokenize(captions), normalize=True)
        own, other = (image @ text.T)[0].tolist()
        matched.append(own)
        mismatched.append(other)
    own, other = np.array(matched), np.array(mismatched)
    rejected = int((other < BOUNDARY).sum()), int((own < BOUNDARY).sum())
    return Separation(
        auc=float((own[:, None] > other[None, :]).mean()),
        matched_low=float(np.percentile(own, 1)),
        mismatched_high=float(np.percentile(other, 99)),
        precision=rejected[0] / max(1, sum(rejected)),
        recall=rejected[0] / pairs,
    )


if __name__ == "__main__":
    main()
