"""From an image's bytes to its header and its pixels, by one set of rules for all who look at a sample.

The rules are what a trainer's `image.convert("RGB")` sees, upright: the first frame, turned as its Exif orientation
says, alpha dropped, colour profiles ignored; but 16-bit grey is cut to its high byte, where Pillow would clip it.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from tasks.curation.image_check import FORMATS, MAX_PIXELS

VERSION = 1
"""Raised when a rule changes what pixels or headers come out; part of the fingerprint of signals that see them."""

_ORIENTATION = 0x0112
_PNG_EXIF = (b"eXIf", b"exif", b"xmp")
"""Words without which a PNG has no orientation. Pillow would decode the whole image to look for it at its end."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Header:
    """What is known of an image without decoding it.

    `width` and `height` are of the upright image, in pixels. `format` is Pillow's name in lower case (jpeg, png,
    webp, gif, …; a JPEG with several pictures inside is mpo). `frames` is None if they can't be counted.
    """

    width: int
    height: int
    format: str
    frames: int | None


@dataclass(frozen=True)
class Pixels:
    """A decoded image: `rgb` is uint8 of shape (height, width, 3), upright.

    The memory is used again for other images: copy what must outlive the call that got it.
    """

    rgb: npt.NDArray[np.uint8]

    @cached_property
    def image(self) -> Image.Image:
        """The pixels as Pillow's RGB image, copied once for all who ask."""
        return Image.fromarray(self.rgb)


class EncodedImage:
    """An image whose header has been read.

    Raises on construction whatever Pillow raises for bytes that it can't read (nearly any exception, for hostile
    ones), and `DecompressionBombError` for more than `image_check.MAX_PIXELS`.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._image = Image.open(BytesIO(data), formats=FORMATS)
        if self._image.width * self._image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{self._image.width} x {self._image.height} px, over {MAX_PIXELS:,}")

    @cached_property
    def header(self) -> Header:
        """The image's header, with its size as the image is looked at."""
        width, height = self._image.size
        if self._orientation >= 5:
            width, height = height, width
        try:
            frames: int | None = getattr(self._image, "n_frames", 1)
        except Exception as error:  # counting walks the file; a later frame that is broken does not harm the first
            logger.debug("frames can't be counted: %s", error)
            frames = None
        return Header(width, height, str(self._image.format).lower(), frames)

    def decode(self, memory: npt.NDArray[np.uint8]) -> Pixels:
        """Return the pixels, in `memory` if that saves a copy; it must hold 3 bytes a pixel.

        JPEGs are decoded by simplejpeg, which gives Pillow's own pixels in less time; whatever it declines (CMYK,
        recoverable errors) and all other formats by Pillow. Raises nearly any exception for damaged bytes.
        """
        rgb = self._decode_jpeg(memory)
        if rgb is None:
            rgb = np.array(_rgb(self._image))
        return Pixels(_upright(rgb, self._orientation))

    @cached_property
    def _orientation(self) -> int:
        if self._image.format == "TIFF":  # Pillow turns these itself
            return 1
        if self._image.format == "PNG" and not any(word in self.data for word in _PNG_EXIF):
            return 1
        try:
            found = self._image.getexif().get(_ORIENTATION, 1)
        except Exception as error:  # Exif is hostile input too
            logger.debug("unreadable Exif: %s", error)
            return 1
        return found if isinstance(found, int) and 1 <= found <= 8 else 1

    def _decode_jpeg(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8] | None:
        image = self._image
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
            return None
        try:
            rgb: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(self.data, "RGB", buffer=memory)
        except ValueError:
            return None
        return rgb if rgb.shape == (image.height, image.width, 3) else None


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I;16"):  # Pillow would clip at 255, which leaves white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # else Pillow warns that it is dropped
    return image.convert("RGB")


def _upright(rgb: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Undo Exif `orientation`: 2-4 mirror or turn by 180°, 5-8 swap width and height as well."""
    if orientation == 1:
        return rgb
    if orientation >= 5:
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)
