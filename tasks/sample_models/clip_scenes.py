"""Pictures and captions as the small CLIP gets them: drawn, through a file, altered, and scaled to its input.

Beside each picture goes an altered copy of it, and a picture that is easily taken for a copy but is none.
"""

import io
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from tasks.curation.sample_alterations import alter
from tasks.curation.sample_images import draw_everyday_format, draw_size, encode, is_achromatic
from tasks.curation.scene import MAX_COUNT, SHAPES, Scene, describe, draw_scene, render

SIDE = 64
"""Width and height of the model's input, pixels."""

PHRASINGS = 4
"""Captions of each picture."""

CHUNK = 250
"""Pictures that one task draws."""

_FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX)


@dataclass(frozen=True)
class Pictures:
    """Training pictures, one row each.

    `views`: uint8 (pictures, 3, 3, SIDE, SIDE), the picture, an altered copy of it, and one of a scene much like it,
    each channels first. `captions`: token ids, int16 (pictures, PHRASINGS, context).
    """

    views: torch.Tensor
    captions: torch.Tensor

    def to(self, device: torch.device) -> "Pictures":
        """The same pictures on `device`."""
        return Pictures(self.views.to(device), self.captions.to(device))

    def __len__(self) -> int:
        return len(self.views)


def draw_chunk(seed: str) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], list[str]]:
    """Draw `CHUNK` rows of `Pictures.views` and, flat, `PHRASINGS` captions of each."""
    rng = random.Random(seed)
    views = np.empty((CHUNK, 3, 3, SIDE, SIDE), dtype=np.uint8)
    captions = []
    for row in range(CHUNK):
        scene = draw_scene(rng)
        width, height = draw_size(rng)
        # Most pictures are drawn small, which is many times faster and looks the same at the model's size.
        shrink = 1.0 if rng.random() < 0.05 else rng.uniform(0.35, 0.55)
        size = (round(width * shrink), round(height * shrink))
        picture = through_file(render(scene, size=size, seed=rng.getrandbits(64)), scene, rng)
        copy = through_file(alter(picture, rng), scene, rng)
        other = draw_similar(scene, rng)
        stranger = through_file(render(other, size=size, seed=rng.getrandbits(64)), other, rng)
        for view, image in enumerate((picture, copy, stranger)):
            small = image.resize((SIDE, SIDE), rng.choice(_FILTERS))
            views[row, view] = np.asarray(small).transpose(2, 0, 1)
        captions += [describe(scene, rng) for _ in range(PHRASINGS)]
    return views, captions


def through_file(image: Image.Image, scene: Scene, rng: random.Random) -> Image.Image:
    """Encode a picture of `scene` as the sample pool does, and decode it to RGB."""
    odd = ["cmyk", "exif_rotated", "palette", *(["grayscale"] if is_achromatic(scene) else [])]
    file_format = rng.choice(odd) if rng.random() < 0.08 else draw_everyday_format(rng)
    decoded = Image.open(io.BytesIO(encode(image, file_format=file_format, rng=rng).data))
    return ImageOps.exif_transpose(decoded).convert("RGB")


def draw_similar(scene: Scene, rng: random.Random) -> Scene:
    """Draw a scene that another picture of is no copy, but looks like one: `scene` with at most one thing changed.

    Unchanged one time in four; else the count, the shape or the size of one group differs.
    """
    changed = rng.choice(("nothing", "count", "shape", "size"))
    at = rng.randrange(len(scene.groups))
    group = scene.groups[at]
    if changed == "count":
        group = replace(group, count=rng.choice([n for n in range(1, MAX_COUNT + 1) if n != group.count]))
    elif changed == "shape":
        taken = {group.shape for group in scene.groups}
        group = replace(group, shape=rng.choice([shape for shape in SHAPES if shape not in taken]))
    elif changed == "size":
        group = replace(group, size="small" if group.size == "large" else "large")
    return Scene(scene.background, (*scene.groups[:at], group, *scene.groups[at + 1 :]))
