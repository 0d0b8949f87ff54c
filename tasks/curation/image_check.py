"""Tells whether an image's bytes can be decoded, without decoding them when that is certain.

The header is parsed by Pillow; a walk over the file's segments then shows whether its end is there. Only a file
whose end is missing or damaged, or whose format has no walk here, is decoded to find out.
"""

import re
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Literal

from PIL import Image, ImageSequence, UnidentifiedImageError

from tasks.curation.sources.contract import Reason, RowError

MAX_PIXELS = 178_956_970
"""Most pixels of one image, from its header: where Pillow itself refuses to open (512 MiB of RGB)."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""Pillow formats that are read. Others are refused: some of Pillow's readers run external programs."""

_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_JPEG_END, _JPEG_SCAN = 0xD9, 0xDA


End = Literal["there", "missing", "unsure"]
"""What a walk over a file finds of its end; unsure where something on the way is damaged."""

Walk = Callable[[bytes], End]


def check_image(data: bytes) -> None:
    """Raise `RowError` if `data` is not an image that decodes.

    Reasons: empty, not_an_image, decompression_bomb (over `MAX_PIXELS`), truncated, corrupt. Damage that a decoder
    passes over silently, such as a flipped bit in a JPEG's entropy-coded data, is not looked for.
    """
    if not data:
        raise RowError(Reason.EMPTY, "0 bytes")
    walk = _walk_of(data)
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} px, over {MAX_PIXELS:,}")
            if walk is None or walk(data) != "there":
                _decode(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RowError(Reason.DECOMPRESSION_BOMB, str(error)) from None
    except UnidentifiedImageError:
        if walk is None:
            raise RowError(Reason.NOT_AN_IMAGE, f"begins with {data[:16]!r}, none of {', '.join(FORMATS)}") from None
        raise _damage(data, walk, "the header can't be read") from None
    except Exception as error:  # decoders raise nearly anything on hostile bytes: struct.error, SyntaxError, …
        raise _damage(data, walk, f"{type(error).__name__}: {error}") from None


def _damage(data: bytes, walk: Walk | None, detail: str) -> RowError:
    truncated = "truncated" in detail if walk is None else walk(data) == "missing"
    return RowError(Reason.TRUNCATED if truncated else Reason.CORRUPT, detail)


def _decode(image: Image.Image) -> None:
    pixels = 0
    for frame in ImageSequence.Iterator(image):
        frame.load()
        pixels += frame.width * frame.height
        if pixels > MAX_PIXELS:  # a million small frames are a bomb too, but the first ones are good
            return


def _walk_of(data: bytes) -> Walk | None:
    """Return the walk for the format `data` begins like, however short it is cut."""
    for magic, walk in ((b"\xff\xd8\xff", _jpeg_end), (b"\x89PNG\r\n\x1a\n", _png_end), (b"GIF8", _gif_end)):
        if data.startswith(magic) or magic.startswith(data):
            return walk
    is_webp = b"RIFF".startswith(data[:4]) and b"WEBP".startswith(data[8:12])
    return _webp_end if is_webp else None


def _jpeg_end(data: bytes) -> End:
    """Look for the end-of-image marker after the first scan (ITU T.81, B.1.1: no marker can occur inside one)."""
    position = 2
    while marker := _JPEG_MARKER.search(data, position):
        kind = data[marker.end() - 1]
        if kind == _JPEG_END:
            return "there"
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
        if kind == _JPEG_SCAN and position < len(data) - 1 and data.endswith(b"\xff\xd9"):
            return "there"
    return "missing"


def _png_end(data: bytes) -> End:
    """Go from chunk to chunk up to IEND, checking their checksums (PNG specification, 5.3)."""
    view, position = memoryview(data), 8
    while len(data) >= position + 12:
        end = position + 8 + int.from_bytes(view[position : position + 4], "big")
        if len(data) < end + 4:
            return "missing"
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return "unsure"
        if data.startswith(b"IEND", position + 4):
            return "there"
        position = end + 4
    return "missing"


def _gif_end(data: bytes) -> End:
    """Go from block to block up to the trailer (GIF89a specification, appendix A)."""
    try:
        position = 13 + _colour_table_bytes(data[10])
        while (block := data[position]) != 0x3B:
            if block == 0x21:
                position += 2
            elif block == 0x2C:
                position += 11 + _colour_table_bytes(data[position + 9])
            else:
                return "unsure"
            while size := data[position]:
                position += 1 + size
            position += 1
    except IndexError:
        return "missing"
    return "there"


def _colour_table_bytes(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _webp_end(data: bytes) -> End:
    """Compare the file's length with its RIFF header's; Pillow checks the chunks inside on opening."""
    return "there" if len(data) > 20 and len(data) >= 8 + int.from_bytes(data[4:8], "little") else "missing"
