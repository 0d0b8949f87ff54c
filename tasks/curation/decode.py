"""From an image's bytes to its header and its pixels, by one set of rules for all who look at a sample.

The rules are what a trainer's `image.convert("RGB")` sees, upright: the first frame, turned as its Exif orientation
says, alpha dropped, colour profiles ignored; but 16-bit grey is cut to its high byte, where Pillow would clip it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
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

Bytes = npt.NDArray[np.uint8]

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


class EncodedImage:
    """An image whose `header` has been read, with its size as the image is looked at.

    Raises on construction whatever Pillow raises for bytes that it can't read (nearly any exception, for hostile
    ones), and `DecompressionBombError` for more than `image_check.MAX_PIXELS`.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._image = Image.open(BytesIO(data), formats=FORMATS)
        if self._image.width * self._image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{self._image.width} x {self._image.height} px, over {MAX_PIXELS:,}")
        # Not cached properties: before Python 3.12 these hold one lock for all images, and threads would take turns.
        self._orientation = _orientation(self._image, data)
        self.header = self._read_header()

    def _read_header(self) -> Header:
        width, height = self._image.size
        if self._orientation >= 5:
            width, height = height, width
        try:
            frames: int | None = getattr(self._image, "n_frames", 1)
        except Exception as error:  # counting walks the file; a later frame that is broken does not harm the first
            logger.debug("frames can't be counted: %s", error)
            frames = None
        return Header(width, height, str(self._image.format).lower(), frames)

    def decode(self, memory: Bytes) -> Bytes:
        """Return the pixels upright, uint8 of shape (height, width, 3), in `memory` if that saves a copy.

        `memory` must hold 3 bytes a pixel. JPEGs are decoded by simplejpeg, which gives Pillow's own pixels in less
        time; whatever it declines (CMYK, recoverable errors) and all other formats by Pillow. Raises nearly any
        exception for damaged bytes.
        """
        rgb = self._decode_jpeg(memory)
        if rgb is None:
            rgb = np.array(_rgb(self._image))
        return self.upright(rgb)

    def decode_reduced(self, side: int) -> "Reduced | None":
        """Return a JPEG's luma in the smallest of libjpeg's sizes with at least `side` pixels on either side.

        That is 1/8 to 4/8 of the image; only so much of the inverse DCT is computed, and none of the colours. None
        where more would be needed, and for all that is no JPEG or that simplejpeg declines: those must be decoded in
        full. As all of the file is read here, what can be reduced can be decoded in full as well.
        """
        width, height = self._image.size
        eighths = -(-8 * side // min(width, height))  # rounded up, here and below
        if eighths > 4 or not self._is_plain_jpeg:
            return None
        shape = -(-height * eighths // 8), -(-width * eighths // 8)
        try:
            luma: Bytes = simplejpeg.decode_jpeg(self.data, "GRAY", min_height=shape[0], min_width=shape[1])[..., 0]
        except ValueError:
            return None
        return Reduced(luma, (height * eighths / 8, width * eighths / 8)) if luma.shape == shape else None

    def upright(self, pixels: Bytes) -> Bytes:
        """Return pixels in the file's own order, of shape (height, width, …), as the Exif orientation turns them."""
        return _upright(pixels, self._orientation)

    @property
    def _is_plain_jpeg(self) -> bool:
        return self._image.format in ("JPEG", "MPO") and self._image.mode in ("RGB", "L")

    def _decode_jpeg(self, memory: Bytes) -> Bytes | None:
        if not self._is_plain_jpeg:
            return None
        try:
            rgb: Bytes = simplejpeg.decode_jpeg(self.data, "RGB", buffer=memory)
        except ValueError:
            return None
        return rgb if rgb.shape == (self._image.height, self._image.width, 3) else None


class Undecodable(Exception):  # noqa: N818 - says what is wrong better with no "Error" behind it
    """An image's pixels can't be had; the cause says why."""


class Pixels:
    """An image, decoded as far as is asked for, and in full only once for all who ask.

    `memory` gives what an image is decoded into. It may be used again for other images: copy what must outlive the
    call that got the pixels. Everything raises `Undecodable` for damaged bytes.
    """

    # Not cached properties; see EncodedImage.

    def __init__(self, encoded: EncodedImage, memory: Callable[[Header], Bytes]) -> None:
        self._encoded, self._memory = encoded, memory
        self._rgb: Bytes | None = None
        self._image: Image.Image | None = None

    @property
    def rgb(self) -> Bytes:
        """The pixels, uint8 of shape (height, width, 3), upright."""
        if self._rgb is None:
            try:
                self._rgb = self._encoded.decode(self._memory(self._encoded.header))
            except Exception as error:  # Pillow and the libraries under it raise nearly anything
                raise Undecodable from error
        return self._rgb

    @property
    def image(self) -> Image.Image:
        """The pixels as Pillow's RGB image, copied once for all who ask."""
        if self._image is None:
            self._image = Image.fromarray(self.rgb)
        return self._image

    def reduced(self, side: int) -> "Reduced | None":
        """Return the image's luma in a smaller size; see `EncodedImage.decode_reduced`."""
        return self._encoded.decode_reduced(side)

    def upright(self, pixels: Bytes) -> Bytes:
        """Return what was made of a reduced image as the image is to be looked at."""
        return self._encoded.upright(pixels)


@dataclass(frozen=True)
class Reduced:
    """A JPEG's luma, decoded to a smaller size, uint8 of shape (height, width), as it lies in the file.

    libjpeg rounds sides up; `extent` is how far the picture itself reaches, in pixels: (height, width), not rounded.
    Scaled without heed to it, the picture would be shifted by up to a pixel of these at its far sides.
    """

    luma: Bytes
    extent: tuple[float, float]


def _orientation(image: Image.Image, data: bytes) -> int:
    """The Exif orientation of an image with these bytes, 1 to 8; 1 if there is none that can be read."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG" and not any(word in data for word in _PNG_EXIF):
        return 1
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # Exif is hostile input too
        logger.debug("unreadable Exif: %s", error)
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I;16"):  # Pillow would clip at 255, which leaves white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # else Pillow warns that it is dropped
    return image.convert("RGB")


def _upright(pixels: Bytes, orientation: int) -> Bytes:
    """Undo Exif `orientation`: 2-4 mirror or turn by 180°, 5-8 swap height and width, the first two axes, as well."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
