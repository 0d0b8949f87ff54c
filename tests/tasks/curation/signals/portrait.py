"""A photograph of one person that a package ships, read without importing the package."""

import importlib.util
from pathlib import Path

from PIL import Image

FACE = (181, 62, 268, 172)
"""Where facenet-pytorch 2.6.0, another MTCNN, finds the face: left, top, right, bottom."""


def portrait() -> Image.Image:
    """Eileen Collins, by NASA, 512 x 512, public domain; from scikit-image."""
    package = importlib.util.find_spec("skimage")
    assert package is not None and package.origin is not None
    return Image.open(Path(package.origin).parent / "data" / "astronaut.png").convert("RGB")


def overlap(box: tuple[int, ...] | list[int], other: tuple[int, ...] | list[int]) -> float:
    """Intersection over union of two boxes."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(0, width) * max(0, height)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    return shared / (sum(areas) - shared)
