"""Train the small CLIP in `tasks/sample_models/clip/`, the offline sample's default for image–text scores.

    python -m tasks.sample_models.make_clip --images 80000 --steps 4000 --out tasks/sample_models/clip

The result is an ordinary open_clip folder (`local-dir:…`): configuration, f16 weights and a tokenizer.
"""

import argparse
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
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional

from tasks.curation.sample_alterations import alter
from tasks.curation.sample_images import draw_size
from tasks.curation.scene import Scene, describe, draw_scene, draw_unlike, render
from tasks.sample_models.clip_scenes import CHUNK, PHRASINGS, SIDE, Pictures, draw_chunk, through_file

log = logging.getLogger(__name__)

MODEL_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIDE, "layers": [1, 2, 2, 1], "width": 16},  # a list of layers means a ResNet
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
"""The cosine that training puts between matched and mismatched pairs: the sample policy's threshold."""

COPY_BOUNDARY = 0.9
"""The cosine that training puts between altered copies of one picture and different pictures."""

_SHARPNESS = 16.0
_COPY_SHARPNESS = 32.0
_BATCH = 256
_PEAK_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class CopySeparation:
    """How far altered copies are nearer to their originals than different pictures are to each other.

    `copies_low` is the first percentile of copies' cosines, `strangers_high` the highest of all other pairs'; `recall`
    and `wrong_pairs` are of taking all above `COPY_BOUNDARY` for copies.
    """

    copies_low: float
    strangers_high: float
    recall: float
    wrong_pairs: int


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
    parser.add_argument("--images", type=int, default=80_000, help="pictures drawn to train on")
    parser.add_argument("--steps", type=int, default=4_000, help=f"optimizer steps of {_BATCH} pairs")
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
        seeds = [f"clip {arguments.seed} {chunk}" for chunk in range(arguments.images // CHUNK)]
        pictures = _collect(pool.imap(draw_chunk, seeds), arguments.out)
    log.info("drew %d pictures", len(pictures))
    model = train(pictures, steps=arguments.steps, seed=arguments.seed)
    save_weights(model, arguments.out)
    log.info("%s", separation(arguments.out, pairs=600, seed=f"held out {arguments.seed}"))
    log.info("%s", copy_separation(arguments.out, pictures=1000, seed=f"held out {arguments.seed}"))


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


def _collect(drawn: Iterator[tuple[np.ndarray[Any, np.dtype[np.uint8]], list[str]]], folder: Path) -> Pictures:
    """Put what was drawn together, and tokenise the captions with the tokenizer in `folder`."""
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    views, tokens = [], []
    for pixels, captions in drawn:
        views.append(torch.from_numpy(pixels))
        tokens.append(tokenize(captions).unflatten(0, (-1, PHRASINGS)).to(torch.int16))
    return Pictures(torch.cat(views), torch.cat(tokens))


def train(pictures: Pictures, *, steps: int, seed: int) -> open_clip.CLIP:
    """Train a fresh model; the same arguments on the same device give nearly the same weights."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = pictures.to(device)
    model = open_clip.CLIP(**MODEL_CONFIG).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, steps, pct_start=0.1)
    batch = min(_BATCH, len(pictures))
    for step in range(steps):
        rows = torch.randint(len(pictures), (batch,), device=device)
        phrasing = torch.randint(PHRASINGS, (batch,), device=device)
        with torch.autocast(device.type, torch.bfloat16):
            embedded = model.encode_image(_model_input(pictures.views[rows]), normalize=True)
        picture, copy, stranger = embedded.float().unflatten(0, (batch, 3)).unbind(1)
        text = model.encode_text(pictures.captions[rows, phrasing].long(), normalize=True)
        scale = model.logit_scale.exp()
        captioned = (pair_loss(picture @ text.T, scale=scale) + pair_loss(copy @ text.T, scale=scale)) / 2
        loss = captioned + copy_loss(picture @ torch.cat([copy, stranger]).T)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 500 == 0 or step == steps - 1:
            log.info("step %d loss %.3f, of captions %.3f", step, loss.item(), captioned.item())
    return model.eval().cpu()


def _model_input(views: torch.Tensor) -> torch.Tensor:
    """Normalise views, uint8 (rows, 3, 3, SIDE, SIDE), as open_clip does: float32 (rows × 3, 3, SIDE, SIDE)."""
    mean, std = (
        torch.tensor(values, device=views.device).view(3, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    pixels = (views.flatten(0, 1).float() / 255 - mean) / std
    return pixels.contiguous(memory_format=torch.channels_last)


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


def copy_loss(cosine: torch.Tensor) -> torch.Tensor:
    """The loss of cosines (pictures, others) whose diagonal holds each picture's altered copy.

    Puts copies above `COPY_BOUNDARY` and all others below, the nearest of them most: multi-similarity loss (Wang et
    al., 2019) with one positive a row, so that one threshold tells copies from different pictures.
    """
    margin = _COPY_SHARPNESS * (cosine - COPY_BOUNDARY)
    copies = functional.softplus(-margin.diagonal())
    is_copy = torch.eye(*margin.shape, dtype=torch.bool, device=margin.device)
    others = functional.softplus(margin.masked_fill(is_copy, -torch.inf).logsumexp(dim=1))
    return (copies + others).mean()


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
            pixels = preprocess(_picture(scene, rng)).unsqueeze(0)
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


def copy_separation(folder: Path, *, pictures: int, seed: str) -> CopySeparation:
    """Look for altered copies of 200 of `pictures` never-seen pictures among all of them, by `COPY_BOUNDARY`."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    rng = random.Random(seed)
    drawn = [_picture(draw_scene(rng), rng) for _ in range(pictures)]
    drawn += [alter(image, rng) for image in drawn[:200]]
    with torch.inference_mode():
        embedded = model.encode_image(torch.stack([preprocess(image) for image in drawn]), normalize=True)
    cosine = (embedded @ embedded.T).triu(1)
    copies = cosine.diagonal(pictures).clone()
    cosine.diagonal(pictures).zero_()
    return CopySeparation(
        copies_low=float(copies.quantile(0.01)),
        strangers_high=float(cosine.max()),
        recall=float((copies >= COPY_BOUNDARY).float().mean()),
        wrong_pairs=int((cosine >= COPY_BOUNDARY).sum()),
    )


def _picture(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture of `scene` of the sample pool's sizes and formats."""
    return through_file(render(scene, size=draw_size(rng), seed=rng.getrandbits(64)), scene, rng)


if __name__ == "__main__":
    main()
