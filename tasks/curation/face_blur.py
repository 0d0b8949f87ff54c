"""Blurring faces in the copies of images that are published; the pool keeps the images as they came."""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tasks.curation.decode import EncodedImage

VERSION = 1
"""Raised when the same image and boxes would come out differently; part of the names of curated files."""

MARGIN = 0.15
"""Share of a box's sides that is blurred beyond it on each side: detectors leave out hair, ears and chin."""

CELLS = 6
"""What is left of a face: so many colours across and down, which no sharpening undoes."""


def blur_faces(data: bytes, boxes: Sequence[Sequence[int]]) -> bytes:
    """Return an image file with an ellipse about each box blurred.

    `boxes` are left, top, right and bottom in pixels of the upright image. A JPEG stays one, at quality 95 and full
    colour resolution; every other format becomes PNG. The image comes out upright, as its first frame, without its
    metadata, which may hold an unblurred thumbnail.
    """
    encoded = EncodedImage(data)
    header = encoded.header
    image = Image.fromarray(encoded.decode(np.empty(3 * header.width * header.height, np.uint8)))
    for box in boxes:
        _blur(image, box)
    file = BytesIO()
    if header.format in ("jpeg", "mpo"):
        image.save(file, "JPEG", quality=95, subsampling=0)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def _blur(image: Image.Image, box: Sequence[int]) -> None:
    left, top, right, bottom = box
    across, down = MARGIN * (right - left), MARGIN * (bottom - top)
    region = (
        max(0, round(left - across)),
        max(0, round(top - down)),
        min(image.width, round(right + across)),
        min(image.height, round(bottom + down)),
    )
    size = region[2] - region[0], region[3] - region[1]
    coarse = image.crop(region).resize((CELLS, CELLS), Image.Resampling.BOX).resize(size, Image.Resampling.BICUBIC)
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((0, 0, size[0] - 1, size[1] - 1), fill=255)
    image.paste(coarse, region[:2], mask.filter(ImageFilter.GaussianBlur(0.02 * min(size))))
