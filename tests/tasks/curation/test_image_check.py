import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageSequence

from tasks.curation.image_check import MAX_PIXELS, check_image
from tasks.curation.sources.contract import Reason, RowError


def picture(mode: str = "RGB", seed: int = 0) -> Image.Image:
    _, x = np.mgrid[0:37, 0:51]
    noise = 30 * np.random.default_rng(seed).standard_normal((37, 51, 3))
    waves = np.stack([127 + 127 * np.sin(x / 7 + c) for c in range(3)], -1) + noise
    return Image.fromarray(waves.clip(0, 255).astype("uint8")).convert(mode)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = 6
    return exif


ANIMATION = {"save_all": True, "append_images": [picture("RGB", 1), picture("RGB", 2)]}
FILES = {
    "jpeg": encoded(picture(), "JPEG", quality=85),
    "jpeg progressive": encoded(picture(), "JPEG", progressive=True),
    "jpeg grey": encoded(picture("L"), "JPEG"),
    "jpeg cmyk": encoded(picture("CMYK"), "JPEG"),
    "jpeg with exif": encoded(picture(), "JPEG", exif=rotated()),
    "jpeg with restart markers": encoded(picture(), "JPEG", restart_marker_blocks=2),
    "png": encoded(picture(), "PNG"),
    "png with alpha": encoded(picture("RGBA"), "PNG"),
    "png palette": encoded(picture("P"), "PNG"),
    "png bilevel": encoded(picture("1"), "PNG"),
    "png animated": encoded(picture(), "PNG", **ANIMATION),
    "webp": encoded(picture(), "WEBP"),
    "webp lossless": encoded(picture(), "WEBP", lossless=True),
    "webp with alpha": encoded(picture("RGBA"), "WEBP"),
    "webp animated": encoded(picture(), "WEBP", **ANIMATION),
    "gif": encoded(picture("P"), "GIF"),
    "gif animated": encoded(picture("P"), "GIF", **ANIMATION),
    "bmp": encoded(picture(), "BMP"),
    "avif": encoded(picture(), "AVIF"),
}


def reason(data: bytes) -> Reason | None:
    try:
        check_image(data)
    except RowError as error:
        return error.reason
    return None


def pillow_decodes(data: bytes) -> bool:
    try:
        with Image.open(BytesIO(data)) as image:
            for frame in ImageSequence.Iterator(image):
                frame.load()
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_passes(name: str) -> None:
    assert reason(FILES[name]) is None


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_exactly_if_pillow_can_not_decode_it(name: str) -> None:
    data = FILES[name]
    cuts = {*range(1, 64), *range(64, len(data), max(1, len(data) // 150)), *range(len(data) - 24, len(data))}
    wrong = [cut for cut in sorted(cuts) if pillow_decodes(data[:cut]) != (reason(data[:cut]) is None)]
    assert not wrong


@pytest.mark.parametrize("name", [name for name in FILES if name.split()[0] in ("jpeg", "png", "webp", "gif")])
def test_a_cut_file_is_called_truncated(name: str) -> None:
    data = FILES[name]
    assert {reason(data[:cut]) for cut in (2, 20, len(data) // 2, len(data) * 9 // 10)} <= {Reason.TRUNCATED, None}


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "png", "webp", "gif"])
def test_a_whole_file_is_not_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert reason(FILES[name]) is None


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "png", "webp", "gif"])
def test_bytes_after_the_end_are_harmless(name: str) -> None:
    assert reason(FILES[name] + b"\0trailer" * 5) is None


def test_the_end_of_an_embedded_thumbnail_is_not_the_end_of_the_image() -> None:
    thumbnail = b"\xff\xfe" + struct.pack(">H", len(FILES["jpeg"]) + 2) + FILES["jpeg"]
    data = FILES["jpeg"][:2] + thumbnail + FILES["jpeg"][2:]
    assert reason(data) is None
    assert reason(data[:-200]) is Reason.TRUNCATED


def test_damaged_png_data_is_corrupt() -> None:
    data = bytearray(FILES["png"])
    data[len(data) // 2] ^= 0xFF
    assert reason(bytes(data)) is Reason.CORRUPT


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_bomb_is_known_by_its_header() -> None:
    assert MAX_PIXELS == 178_956_970
    assert reason(png_header(MAX_PIXELS + 1, 1)) is Reason.DECOMPRESSION_BOMB
    assert reason(png_header(60_000, 60_000)) is Reason.DECOMPRESSION_BOMB


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_on_pixels_stands_whatever_others_set_in_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(png_header(MAX_PIXELS, 1)) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert reason(png_header(MAX_PIXELS + 1, 1)) is Reason.DECOMPRESSION_BOMB


@pytest.mark.parametrize("data", [b"<html>404</html>", b"\0" * 1000, b"RIFF\x24\0\0\0WAVEfmt ", b"%!PS-Adobe-3.0 EPSF"])
def test_other_files_are_not_images(data: bytes) -> None:
    assert reason(data) is Reason.NOT_AN_IMAGE


def test_no_bytes_are_empty() -> None:
    assert reason(b"") is Reason.EMPTY


@given(st.binary(max_size=200), st.sampled_from(sorted(FILES)), st.integers(0, 200))
def test_no_bytes_break_the_check(noise: bytes, name: str, kept: int) -> None:
    reason(FILES[name][:kept] + noise)
