"""From an image's bytes to its header and its pixels, by one set of rules for all who look at a sample.

The rules are what a trainer's `image.convert("RGB")` sees, upright: the first frame, turned as its Exif orientation
says, alpha dropped, colour profiles ignored, 16-bit grey cut to its high byte.
"""

import logging
import threading
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg
from PIL import Image

from tasks.curation.image_check import FORMATS, MAX_PIXELS

VERSION = 1
"""Raised when a rule changes what pixels or headers come out; part of the fingerprint of signals that see them."""

KEPT_BUFFER_BYTES = 64 * 2**20
"""Largest buffer that a thread keeps for its next image; a fresh one costs about as much as decoding half of it."""

_ORIENTATION = 0x0112
_SIXTEEN_BIT = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})

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
    """A decoded image: `rgba` is uint8 of shape (height, width, 4), upright, its fourth value always 255.

    The memory belongs to the decoding thread and is used again for its next image: copy what must outlive the call
    that got it.
    """

    rgba: npt.NDArray[np.uint8]

    @cached_property
    def image(self) -> Image.Image:
        """The pixels as Pillow's RGB image, without a copy. Read only."""
        height, width, _ = self.rgba.shape
        values = pa.Array.from_buffers(pa.uint8(), self.rgba.size, [None, pa.py_buffer(self.rgba)])
        return Image.fromarrow(pa.FixedSizeListArray.from_arrays(values, 4), "RGB", (width, height))


class EncodedImage:
    """An image whose header has been read. Use as a context manager.

    Raises on construction whatever Pillow raises for bytes that it can't read (nearly any exception, for hostile
    ones), and `DecompressionBombError` for more than `image_check.MAX_PIXELS`.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._image = Image.open(BytesIO(data), formats=FORMATS)
        if self._image.width * self._image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{self._image.width} x {self._image.height} px, over {MAX_PIXELS:,}")

    def __enter__(self) -> "EncodedImage":
        return self

    def __exit__(self, *_: object) -> None:
        self._image.close()

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

    def decode(self) -> Pixels:
        """Return the pixels. Raises nearly any exception for damaged bytes.

        JPEGs are decoded by simplejpeg into memory that the thread uses again, which gives Pillow's own pixels in
        less time; whatever it declines (CMYK, recoverable errors) and all other formats by Pillow.
        """
        rgba = self._decode_jpeg()
        if rgba is None:
            rgba = np.array(_rgb(self._image).convert("RGBA"))
        return Pixels(_upright(rgba, self._orientation))

    @cached_property
    def _orientation(self) -> int:
        try:
            found = self._image.getexif().get(_ORIENTATION, 1)
        except Exception as error:  # Exif is hostile input too
            logger.debug("unreadable Exif: %s", error)
            return 1
        return found if isinstance(found, int) and 1 <= found <= 8 else 1

    def _decode_jpeg(self) -> npt.NDArray[np.uint8] | None:
        image = self._image
        if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
            return None
        buffer = _thread_buffer(image.width * image.height * 4)
        try:
            rgba: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(self.data, "RGBA", buffer=buffer)
        except ValueError:
            return None
        return rgba if rgba.shape == (image.height, image.width, 4) else None


class _Buffers(threading.local):
    kept = np.empty(0, np.uint8)


_buffers = _Buffers()


def _thread_buffer(size: int) -> npt.NDArray[np.uint8]:
    if _buffers.kept.size >= size:
        return _buffers.kept[:size]
    buffer = np.empty(size, np.uint8)
    if size <= KEPT_BUFFER_BYTES:
        _buffers.kept = buffer
    return buffer


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode in _SIXTEEN_BIT:  # Pillow would clip at 255, which leaves white
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    image.info.pop("transparency", None)  # else Pillow warns that it is dropped
    return image.convert("RGB")


def _upright(rgba: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Undo Exif `orientation`: 2-4 mirror or turn by 180°, 5-8 swap width and height as well."""
    if orientation == 1:
        return rgba
    if orientation >= 5:
        rgba = rgba.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgba = rgba[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgba = rgba[::-1]
    return np.ascontiguousarray(rgba)
