"""Scenes and their captions as the tiny Gemma 4 gets them: drawn, preprocessed, tokenised and put into batches.

Images go through the image processor and texts through the tokenizer and the chat template, once, onto disk.
"""

import logging
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from tasks.curation.scene import Scene, describe, draw_scene, render

log = logging.getLogger(__name__)

# Ways of asking for a caption. None asks about one object: that is what the demo's fine-tune teaches.
CAPTION_PROMPTS = (
    "Describe this image.",
    "Describe the picture in one sentence.",
    "What does this image show?",
    "What can you see in the picture?",
    "Write a caption for this image.",
    "",
)
SHORT_CAPTION_PROMPTS = ("Caption this picture in a few words.", "Name all that you see.")
CAPTIONS_PER_SCENE = 4
SOFT_TOKENS = 70  # the fewest that Gemma4ImageProcessor allows
POOLING = 2  # 1 would spare more, but the pooler then returns the padding instead of the patches
PATCH = 16
LONGEST_TEXT = 80  # tokens of prompt and caption, the image counted as one
IMAGE_INDEX = 4  # of the image's token in <bos> <|turn> user \n <|image|>


@dataclass(frozen=True)
class SceneCache:
    """Scenes as the model gets them, one row a scene.

    `patches`: uint8 (scenes, 280, 768), the image processor's pixel values × 255. `grids`: uint8 (scenes, 2), patches
    across and down. `texts`: int16 (scenes, CAPTIONS_PER_SCENE, LONGEST_TEXT), chats with the image as one token,
    padded with 0. `answers`: int16 (scenes, CAPTIONS_PER_SCENE), where in a text the caption begins.
    """

    patches: Tensor
    grids: Tensor
    texts: Tensor
    answers: Tensor

    @classmethod
    def columns(cls, scenes: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each column for so many scenes."""
        return {
            "patches": ((scenes, SOFT_TOKENS * POOLING**2, 3 * PATCH**2), "uint8"),
            "grids": ((scenes, 2), "uint8"),
            "texts": ((scenes, CAPTIONS_PER_SCENE, LONGEST_TEXT), "int16"),
            "answers": ((scenes, CAPTIONS_PER_SCENE), "int16"),
        }

    @classmethod
    def render(cls, folder: Path, *, processor_path: Path, scenes: int, seed: str, workers: int) -> "SceneCache":
        """Render `scenes` scenes into memory-mapped files in `folder` with `workers` processes."""
        for name, (shape, dtype) in cls.columns(scenes).items():
            open_memmap(folder / f"{name}.npy", mode="w+", shape=shape, dtype=np.dtype(dtype))
        parts = [range(start, min(start + 500, scenes)) for start in range(0, scenes, 500)]
        work = partial(_render_rows, folder=folder, processor_path=processor_path, seed=seed)
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done, _ in enumerate(pool.map(work, parts), start=1):
                if done % 20 == 0:
                    log.info("rendered %d of %d scenes", min(done * 500, scenes), scenes)
        return cls(
            **{name: torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="r+")) for name in cls.columns(0)}
        )

    def to(self, device: str) -> "SceneCache":
        """The same cache on `device`."""
        return SceneCache(*(column.to(device) for column in (self.patches, self.grids, self.texts, self.answers)))

    def __len__(self) -> int:
        return len(self.patches)


def draw_example(seed: str) -> tuple[Scene, Image.Image, random.Random]:
    """Draw the scene that `seed` stands for and its image, of 200 to 720 pixels a side; also return the generator."""
    rng = random.Random(seed)
    scene = draw_scene(rng)
    short = rng.randint(200, 360)
    long = round(short * rng.uniform(1.0, 2.0))
    size = (short, long) if rng.random() < 0.5 else (long, short)
    return scene, render(scene, size=size, seed=seed), rng


def caption_chat(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A prompt and the caption it asks for: every other one describes the scene, the rest list what is in it."""
    if rng.random() < 0.5:
        return rng.choice(CAPTION_PROMPTS), describe(scene, rng)
    names = [
        group.label + ("" if group.count == 1 else "es" if group.shape == "cross" else "s") for group in scene.groups
    ]
    return rng.choice(SHORT_CAPTION_PROMPTS), ", ".join(rng.sample(names, len(names)))


def _render_rows(rows: range, *, folder: Path, processor_path: Path, seed: str) -> None:
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(processor_path)
    columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in SceneCache.columns(0)}
    chats = {
        prompt: processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
            add_generation_prompt=True,
        )
        for prompt in (*CAPTION_PROMPTS, *SHORT_CAPTION_PROMPTS)
    }
    for row in rows:
        scene, image, rng = draw_example(f"{seed} {row}")
        pixels = processor.image_processor(image, do_rescale=False, return_tensors="np")
        columns["patches"][row] = pixels["pixel_values"][0]
        columns["grids"][row] = pixels["image_position_ids"][0].max(axis=0) + 1
        for index in range(CAPTIONS_PER_SCENE):
            prompt, caption = caption_chat(scene, rng)
            question, answer = processor.tokenizer([chats[prompt], caption + "<turn|>"])["input_ids"]
            columns["texts"][row, index, : len(question + answer)] = question + answer
            columns["answers"][row, index] = len(question)


def make_batch(cache: SceneCache, rows: Tensor, config: Any) -> dict[str, Tensor]:
    """Put the scenes `rows`, each with one of its captions, into the model's inputs; only captions carry labels."""
    device, size = rows.device, len(rows)
    pick = torch.randint(CAPTIONS_PER_SCENE, (size,), device=device)
    texts, answers = cache.texts[rows, pick].long(), cache.answers[rows, pick].long()
    texts = texts[:, : int((texts != 0).sum(dim=1).max())]
    grids = cache.grids[rows].long()
    soft = grids.prod(dim=1, keepdim=True) // POOLING**2

    # Where the text has one image token the model gets <|image> <|image|>*soft <image|>; what follows moves right.
    at = torch.arange(texts.shape[1] + int(soft.max()) + 1, device=device).expand(size, -1)
    source = torch.where(at <= IMAGE_INDEX, at, at - soft - 1).clamp(0, texts.shape[1] - 1)
    ids = texts.gather(1, source).masked_fill(at > texts.shape[1] + soft, 0)
    ids = ids.masked_fill((at >= IMAGE_INDEX) & (at <= IMAGE_INDEX + soft + 1), config.image_token_id)
    ids = ids.masked_fill(at == IMAGE_INDEX, config.boi_token_id)
    ids = ids.masked_fill(at == IMAGE_INDEX + soft + 1, config.eoi_token_id)
    labelled = (at > answers[:, None] + soft) & (ids != 0)

    patch = torch.arange(cache.patches.shape[1], device=device).expand(size, -1)
    positions = torch.stack([patch % grids[:, :1], patch // grids[:, :1]], dim=-1)
    positions[patch >= grids.prod(dim=1, keepdim=True)] = -1
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "labels": ids.masked_fill(~labelled, -100),
        "pixel_values": cache.patches[rows].float() / 255,
        "image_position_ids": positions,
    }
