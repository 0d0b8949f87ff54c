"""Copies of a picture that somebody has altered: cropped, turned, framed or toned, as pools from the web hold them.

What the caption says stays true, but a perceptual hash no longer finds them: they are for embeddings to find.
"""

import io
import math
import random
from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from tasks.curation.sample_images import EVERYDAY_FORMATS, ImageFile, encode
from tasks.curation.signals.perceptual import THUMBNAIL, phash
from tasks.curation.signals.thumbnail import thumbnail

NEAR = 4
"""Differing bits of 64 up to which a perceptual hash finds a copy; altered ones differ in more."""

_Change = Callable[[Image.Image, random.Random], Image.Image]

_MARGIN = 0.06
"""Share of a side that a crop may take off one end: shapes lose a little at most, so the caption stays true."""

_FRAMES = ((255, 255, 255), (0, 0, 0), (128, 128, 128))


def encode_altered(data: bytes, *, rng: random.Random) -> ImageFile:
    """Decode an image, alter it until its perceptual hash is more than `NEAR` away, and encode it again.

    Its shorter side is as long as it was, so that no condition on sizes takes it.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    while True:
        altered = alter(image, rng, most_cut=_MARGIN)
        scale = min(image.size) / min(altered.size)
        scaled = altered.resize((round(altered.width * scale), round(altered.height * scale)), Image.Resampling.LANCZOS)
        file = encode(scaled, file_format=rng.choice(EVERYDAY_FORMATS), rng=rng)
        if _bits_apart(image, Image.open(io.BytesIO(file.data)).convert("RGB")) > NEAR:
            return file


def alter(image: Image.Image, rng: random.Random, *, most_cut: float = 0.12) -> Image.Image:
    """Crop, turn or frame an RGB image, one time in three two of these; half of the time change its tones too.

    Crops take 5 to 12 % off the width and the height, and at most `most_cut` of either from one end.
    """
    kinds: tuple[_Change, ...] = (partial(_crop, most_cut=most_cut), _turn, _frame)
    changes = rng.sample(kinds, 2 if rng.random() < 1 / 3 else 1)
    if rng.random() < 0.5:
        changes.append(_tone)
    for change in changes:
        image = change(image, rng)
    return image


def _crop(image: Image.Image, rng: random.Random, *, most_cut: float) -> Image.Image:
    width, height = (round(side * (1 - rng.uniform(0.05, 0.12))) for side in image.size)
    left, top = _cut(image.width, width, most_cut, rng), _cut(image.height, height, most_cut, rng)
    return image.crop((left, top, left + width, top + height))


def _cut(side: int, left_over: int, most_cut: float, rng: random.Random) -> int:
    """Draw how many pixels of `side` go at its beginning, the rest of what goes at its end."""
    most, goes = math.ceil(side * most_cut), side - left_over
    return rng.randint(max(0, goes - most), min(goes, most))


def _turn(image: Image.Image, rng: random.Random) -> Image.Image:
    """Turn by 2 to 4 degrees either way, and cut the empty corners off."""
    degrees = rng.choice((-1, 1)) * rng.uniform(2, 4)
    angle = math.radians(abs(degrees))
    longer, shorter = max(image.size), min(image.size)
    share = 1 / (math.cos(angle) + math.sin(angle) * longer / shorter)
    width, height = (int(side * share) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    turned = image.rotate(degrees, Image.Resampling.BICUBIC)
    return turned.crop((left, top, left + width, top + height))


def _frame(image: Image.Image, rng: random.Random) -> Image.Image:
    """Put a plain frame of 3 to 7 % of the shorter side around it."""
    return ImageOps.expand(image, round(min(image.size) * rng.uniform(0.03, 0.07)), rng.choice(_FRAMES))


def _tone(image: Image.Image, rng: random.Random) -> Image.Image:
    """Change brightness and contrast by up to 15 %, and saturation by up to 20 %."""
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.85, 1.15))
    return ImageEnhance.Color(image).enhance(rng.uniform(0.8, 1.2))


def _bits_apart(one: Image.Image, other: Image.Image) -> int:
    codes = phash(np.stack([thumbnail(np.asarray(image), THUMBNAIL) for image in (one, other)]))
    return int(codes[0] ^ codes[1]).bit_count()
