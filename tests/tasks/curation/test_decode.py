import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps, UnidentifiedImageError

from tasks.curation.decode import EncodedImage
from tests.tasks.curation.images import encoded, kinds_of_files, oriented, photograph

FILES = kinds_of_files()


def decoded(data: bytes) -> np.ndarray:
    image = EncodedImage(data)
    assert image.header.width in (97, 61)  # read first, as in scoring
    return image.decode(np.empty(97 * 61 * 3, np.uint8))


def by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    image.info.pop("transparency", None)
    return ImageOps.exif_transpose(image).convert("RGB")


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "png_16_bit"])
def test_pixels_are_those_of_pillow_turned_upright_and_converted_to_rgb(kind: str) -> None:
    assert np.array_equal(decoded(FILES[kind]), np.asarray(by_pillow(FILES[kind])))


@pytest.mark.parametrize("kind", FILES)
def test_the_header_has_the_size_of_the_pixels(kind: str) -> None:
    header = EncodedImage(FILES[kind]).header
    assert (header.height, header.width, 3) == decoded(FILES[kind]).shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    data = oriented(photograph(), kind, orientation)
    pixels = decoded(data)
    assert np.array_equal(pixels, np.asarray(by_pillow(data)))
    header = EncodedImage(data).header
    assert (header.height, header.width, 3) == pixels.shape


def test_sixteen_bit_grey_keeps_its_high_byte_instead_of_turning_white() -> None:
    assert np.array_equal(decoded(FILES["png_16_bit"])[..., 0], np.asarray(photograph().convert("L")))


def test_an_animation_shows_its_first_frame() -> None:
    assert np.array_equal(decoded(FILES["webp_animated"]), np.asarray(Image.open(io.BytesIO(FILES["webp_animated"]))))


@pytest.mark.parametrize(
    ("kind", "format", "frames"), [("jpeg", "jpeg", 1), ("mpo", "mpo", 3), ("gif_animated", "gif", 3)]
)
def test_the_header_names_format_and_frames(kind: str, format: str, frames: int) -> None:
    header = EncodedImage(FILES[kind]).header
    assert (header.format, header.frames) == (format, frames)


def test_a_png_without_exif_is_not_decoded_for_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert EncodedImage(FILES["png"]).header.width == 97


def test_an_orientation_that_is_none_leaves_the_image_as_it_lies() -> None:
    as_text = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd\0\0\0\0"
    for data in (oriented(photograph(), "JPEG", 9), encoded(photograph(), "JPEG", quality=95, exif=as_text)):
        assert np.array_equal(decoded(data), np.asarray(Image.open(io.BytesIO(data))))


def test_exif_that_pillow_fails_on_leaves_the_image_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Image.Image) -> Image.Exif:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "as in huggingface/datasets#7668")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert np.array_equal(decoded(FILES["jpeg"]), np.asarray(Image.open(io.BytesIO(FILES["jpeg"]))))


def test_a_truncated_jpeg_has_a_header_and_no_pixels() -> None:
    cut = EncodedImage(FILES["jpeg"][:-400])
    assert cut.header.width == 97
    with pytest.raises(OSError, match="truncated"):
        cut.decode(np.empty(97 * 61 * 3, np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("size", "eighths"), [((640, 480), 2), ((769, 1023), 1), ((211, 500), 4), ((200, 3000), 4)])
def test_a_jpeg_is_reduced_as_pillow_drafts_it_to_the_smallest_size_that_is_wide_and_high_enough(
    mode: str, size: tuple[int, int], eighths: int
) -> None:
    data = encoded(photograph(*size).convert(mode), "JPEG")
    drafted = Image.open(io.BytesIO(data))
    drafted.draft("L", (size[0] * eighths // 8, size[1] * eighths // 8))
    reduced = EncodedImage(data).decode_reduced(96)
    assert reduced is not None
    assert np.array_equal(reduced.luma, np.asarray(drafted))
    assert reduced.extent == (size[1] * eighths / 8, size[0] * eighths / 8)


def test_what_is_too_small_or_no_plain_jpeg_is_not_reduced() -> None:
    large = photograph(640, 480)
    assert EncodedImage(encoded(large, "JPEG")).decode_reduced(96) is not None
    for data in (encoded(large, "PNG"), encoded(large.convert("CMYK"), "JPEG"), encoded(photograph(640, 191), "JPEG")):
        assert EncodedImage(data).decode_reduced(96) is None


def test_a_truncated_jpeg_is_not_reduced_either() -> None:
    assert EncodedImage(encoded(photograph(640, 480), "JPEG")[:-400]).decode_reduced(96) is None


def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(UnidentifiedImageError):
        EncodedImage(b"<html>not found</html>")


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.curation.decode.MAX_PIXELS", 97 * 61 - 1)
    with pytest.raises(Image.DecompressionBombError):
        EncodedImage(FILES["png"])


def test_transparency_is_dropped_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded(FILES["png_palette_transparent"])
