"""The sample pool's image files: everyday formats, odd ones that must be kept, and broken ones that must not.

Each function takes its random generator, so that the same seed gives the same bytes.
"""

import io
import random
import struct
import zlib
from dataclasses import dataclass
from functools import cache

from PIL import Image

from tasks.curation.scene import Scene, render

EVERYDAY_FORMATS = ("jpeg", "png", "webp")
ODD_FORMATS = ("cmyk", "exif_rotated", "palette", "animated", "grayscale")
ACHROMATIC = {"black", "white", "grey"}

_BOMB_SIDE = 30_000
_ORIENTATION_TAG = 0x0112
# EXIF orientation -> the transposition that stores the pixels so that a reader applying the tag turns them upright.
_STORED_AS = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True)
class ImageFile:
    """An encoded image: its bytes, file extension without a dot, and upright size in pixels."""

    data: bytes
    extension: str
    width: int
    height: int


def draw_size(rng: random.Random) -> tuple[int, int]:
    """A width and height of 200 to 900 pixels, mostly small, with an aspect ratio of at most 1.9."""
    short = round(200 + 270 * rng.random() ** 1.5)
    long = round(short * rng.uniform(1.0, 1.9))
    return (short, long) if rng.random() < 0.4 else (long, short)


def draw_small_size(rng: random.Random) -> tuple[int, int]:
    """A width and height whose shorter side has 64 to 180 pixels."""
    short = rng.randint(64, 180)
    long = round(short * rng.uniform(1.0, 1.5))
    return (short, long) if rng.random() < 0.5 else (long, short)


def draw_extreme_size(rng: random.Random) -> tuple[int, int]:
    """A width and height of 200 to 900 pixels, one more than three times the other."""
    short = rng.randint(200, 230)
    long = round(short * rng.uniform(3.2, 3.9))
    return (short, long) if rng.random() < 0.5 else (long, short)


def draw_everyday_format(rng: random.Random) -> str:
    """One of `EVERYDAY_FORMATS`, as often as the web has them: seven in ten are JPEG."""
    return rng.choices(EVERYDAY_FORMATS, weights=(70, 15, 15))[0]


def is_achromatic(scene: Scene) -> bool:
    """Whether the scene's caption stays true when the image loses its colours."""
    return {scene.background, *(group.colour for group in scene.groups)} <= ACHROMATIC


def encode(image: Image.Image, *, file_format: str, rng: random.Random) -> ImageFile:
    """Encode an RGB image as one of `EVERYDAY_FORMATS` or one of `ODD_FORMATS` but `animated`.

    Raises `ValueError` for any other format.
    """
    buffer = io.BytesIO()
    extension = "jpg"
    quality = rng.randint(70, 95)
    match file_format:
        case "jpeg":
            image.save(buffer, "JPEG", quality=quality)
        case "png":
            image.save(buffer, "PNG", compress_level=1)
            extension = "png"
        case "webp":
            image.save(buffer, "WEBP", quality=quality, method=1)
            extension = "webp"
        case "cmyk":
            image.convert("CMYK").save(buffer, "JPEG", quality=quality)
        case "exif_rotated":
            orientation = rng.choice(list(_STORED_AS))
            exif = Image.Exif()
            exif[_ORIENTATION_TAG] = orientation
            image.transpose(_STORED_AS[orientation]).save(buffer, "JPEG", quality=quality, exif=exif)
        case "palette":
            image.quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG")
            extension = "png"
        case "grayscale":
            image.convert("L").save(buffer, "JPEG", quality=quality)
        case _:
            raise ValueError(f"no such sample image format: {file_format!r}")
    return ImageFile(buffer.getvalue(), extension, image.width, image.height)


def encode_animation(scene: Scene, *, size: tuple[int, int], rng: random.Random) -> ImageFile:
    """Encode three pictures of `scene` as an animated GIF or WebP."""
    first, *others = (render(scene, size=size, seed=rng.getrandbits(64)) for _ in range(3))
    extension = rng.choice(("gif", "webp"))
    buffer = io.BytesIO()
    first.save(buffer, extension.upper(), save_all=True, append_images=others, duration=120, loop=0)
    return ImageFile(buffer.getvalue(), extension, *size)


def encode_copy(data: bytes, *, scale: float, rng: random.Random) -> ImageFile:
    """Decode an image and encode it again, `scale` times as large, at another quality or in another format."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if scale != 1.0:
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return encode(image, file_format=rng.choice(EVERYDAY_FORMATS), rng=rng)


def truncate(file: ImageFile, rng: random.Random) -> ImageFile:
    """Cut `file` off after 30 to 80 % of its bytes."""
    end = int(len(file.data) * rng.uniform(0.3, 0.8))
    return ImageFile(file.data[:end], file.extension, file.width, file.height)


def bogus_file(rng: random.Random) -> ImageFile:
    """Bytes that are no image under an image's name: an error page, JSON, a ZIP header or noise."""
    data = rng.choice(
        (
            b"<!DOCTYPE html><html><head><title>404 Not Found</title></head><body>Gone.</body></html>",
            b'{"error": {"code": 403, "message": "hotlinking is not allowed"}}',
            b"PK\x03\x04" + rng.randbytes(400),
            rng.randbytes(1200),
        )
    )
    return ImageFile(data + b"\n" + rng.randbytes(8), rng.choice(("jpg", "png", "webp")), 0, 0)


def bomb(rng: random.Random) -> ImageFile:
    """A valid PNG of about 110 kB that decodes to 900 megapixels."""
    header = struct.pack(">IIBBBBB", _BOMB_SIDE, _BOMB_SIDE, 1, 0, 0, 0, 0)
    comment = b"Comment\0" + rng.randbytes(8).hex().encode()
    chunks = ((b"IHDR", header), (b"tEXt", comment), (b"IDAT", _bomb_pixels()), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, body) for kind, body in chunks)
    return ImageFile(data, "png", _BOMB_SIDE, _BOMB_SIDE)


@cache
def _bomb_pixels() -> bytes:
    row = bytes(1 + _BOMB_SIDE // 8)  # filter byte, then one bit a pixel
    compressor = zlib.compressobj(9)
    return b"".join(compressor.compress(row) for _ in range(_BOMB_SIDE)) + compressor.flush()


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
