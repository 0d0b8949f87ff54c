"""Tells whether an image's bytes can be decoded, without decoding them when that is certain.

The header is parsed by Pillow; a walk over the file's segments then shows whether its end is there. Only a file
whose end is missing or damaged, or whose format has no walk here, is decoded to find out.
"""

import re
import zlib
from collections.abc import Callable
from io import BytesIO

from PIL import Image, ImageSequence, UnidentifiedImageError

from tasks.curation.sources.contract import Reason, RowError

MAX_PIXELS = 178_956_970
"""Most pixels of one image, from its header: where Pillow itself refuses to open (512 MiB of RGB)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Pillow formats that are read. Others are refused: some of Pillow's readers run external programs."""

_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA


def check_image(data: bytes) -> None:
    """Raise `RowError` if `data` is not an image that decodes.

    Reasons: empty, not_an_image, decompression_bomb (over `MAX_PIXELS`), truncated, corrupt. Damage that a decoder
    passes over silently, such as a flipped bit in a JPEG's entropy-coded data, is not looked for.
    """
    if not data:
        raise RowError(Reason.EMPTY, "0 bytes")
    is_complete = _walk_of(data)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} px, over {MAX_PIXELS:,}")
            if is_complete is None or not is_complete(data):
                _decode(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(Reason.DECOMPRESSION_BOMB, str(error)) from None
    except UnidentifiedImageError:
        if is_complete is None:
            raise RowError(Reason.NOT_AN_IMAGE, f"begins with {data[:16]!r}, none of {', '.join(FORMATS)}") from None
        raise _damage(data, is_complete, "the header can't be read") from None
    except Exception as error:  # decoders raise nearly anything on hostile bytes: struct.error, SyntaxError, …
        raise _damage(data, is_complete, f"{type(error).__name__}: {error}") from None


def _damage(data: bytes, is_complete: Callable[[bytes], bool] | None, detail: str) -> RowError:
    truncated = "truncated" in detail if is_complete is None else not is_complete(data)
    return RowError(Reason.TRUNCATED if truncated else Reason.CORRUPT, detail)


def _decode(image: Image.Image) -> None:
    pixels = 0
    for frame in ImageSequence.Iterator(image):
        frame.load()
        pixels += frame.width * frame.height
        if pixels > MAX_PIXELS:  # a million small frames are a bomb too, but the first ones are good
            return


def _walk_of(data: bytes) -> Callable[[bytes], bool] | None:
    """Return the walk for the format `data` begins like, however short it is cut."""
    for magic, is_complete in (
        (b"\xff\xd8\xff", _jpeg_is_complete),
        (b"\x89PNG\r\n\x1a\n", _png_is_complete),
        (b"GIF8", _gif_is_complete),
    ):
        if data.startswith(magic) or magic.startswith(data):
            return is_complete
    is_webp = b"RIFF".startswith(data[:4]) and b"WEBP".startswith(data[8:12])
    return _webp_is_complete if is_webp else None


def _jpeg_is_complete(data: bytes) -> bool:
    """Whether the end-of-image marker follows the first scan (ITU T.81, B.1.1: no marker can occur inside one)."""
    position = 2
    while marker := _JPEG_MARKER.search(data, position):
        kind = data[marker.end() - 1]
        if kind == _JPEG_END:
            return True
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
        if kind == _JPEG_SCAN and position < len(data) - 1 and data.endswith(b"\xff\xd9"):
            return True
    return False


def _png_is_complete(data: bytes) -> bool:
    """Whether all chunks up to IEND are there and their checksums are right (PNG specification, 5.3)."""
    view, position = memoryview(data), 8
    while len(data) >= position + 12:
        end = position + 8 + int.from_bytes(view[position : position + 4], "big")
        if len(data) < end + 4 or zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return False
        if data.startswith(b"IEND", position + 4):
            return True
        position = end + 4
    return False


def _gif_is_complete(data: bytes) -> bool:
    """Whether blocks follow each other up to the trailer (GIF89a specification, appendix A)."""
    try:
        position = 13 + _colour_table_bytes(data[10])
        while (block := data[position]) != 0x3B:
            if block == 0x21:
                position += 2
            elif block == 0x2C:
                position += 11 + _colour_table_bytes(data[position + 9])
            else:
                return False
            while size := data[position]:
                position += 1 + size
            position += 1
    except IndexError:
        return False
    return True


def _colour_table_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _webp_is_complete(data: bytes) -> bool:
    """Whether the file is as long as its RIFF header says; Pillow checks the chunks inside on opening."""
    return len(data) >= 8 + int.from_bytes(data[4:8], "little") and len(data) > 20
