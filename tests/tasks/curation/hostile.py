"""A source of hostile and odd rows in every format, each with what must become of it, told by the rule that made it.

Images are good or not by what Pillow decodes, the library every trainer uses; all else is known from how it was made.
"""

import hashlib
import io
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageCms, ImageSequence

from tests.tasks.curation.images import encoded, kinds_of_files, photograph
from tests.tasks.curation.source_files import member, write_lines, write_members

MARKUP = "</figure><script>alert(1)</script><img src=x onerror='alert(2)'>"
INJECTION = "'; DROP TABLE samples; -- \" OR 1=1 $words_min {{ 7 * 7 }} {0} %s"
SAMPLE = "sample"
"""The fate of a row that becomes a sample; every other fate is the reason of a row in quarantine."""

ANY_DAMAGE = frozenset({"truncated", "corrupt", "not_an_image", "empty"})


@dataclass(frozen=True)
class Row:
    """One row of the source: the file it is in, its key, and the fates it may have. `decodes` is false for a sample
    whose image passes the check on ingest and fails in scoring."""

    file: str
    key: str
    fates: frozenset[str]
    decodes: bool = True


def write_hostile(folder: Path, *, outside: Path) -> list[Row]:
    """Write the source files into `folder`; members and paths that lead out of it point at `outside`."""
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(encoded(photograph(seed=99), "JPEG"))
    rows = [
        *_write_images(folder / "images.tar"),
        *_write_captions(folder / f"{INJECTION.replace('/', '')}.tar"),
        *_write_names(folder / os.fsdecode(b"not utf8 \xe9\xff {name}.tar"), outside),
        *_write_tables(folder),
        *_write_lines(folder / "lines.jsonl", outside),
        *_write_broken(folder),
    ]
    return rows


def _row(file: Path, key: str, *fates: str, decodes: bool = True) -> Row:
    return Row(valid_text(file.name), key, frozenset(fates), decodes)


def valid_text(name: str) -> str:
    """A file name as it is stored: bytes that are not UTF-8 written out."""
    return name.encode("utf-8", "backslashreplace").decode()


# -- images ---------------------------------------------------------------------------------------------------


def _write_images(path: Path) -> list[Row]:
    """A tar with one image a row: every kind whole, three cut at every region, bombs, and what is no image."""
    images = {f"whole/{name}": data for name, data in kinds_of_files().items()}
    images |= {f"cut/{name}-{at}": data[:at] for name, data, at in _cuts()}
    images |= {f"odd/{name}": data for name, data in _odd().items()}
    rows, members = [], []
    for number, (key, data) in enumerate(images.items()):
        members += [
            member(f"{key}.jpg", data),
            member(f"{key}.txt", f"a picture with the number {number} on it".encode()),
        ]
        rows.append(_row(path, key, *([SAMPLE] if pillow_decodes(data) else ANY_DAMAGE)))
    for key, (data, reason) in _bombs().items():
        members += [member(f"{key}.png", data), member(f"{key}.txt", b"a picture that is far too large")]
        rows.append(_row(path, key, reason))
    for key, data in {"hollow-png": _hollow_png()}.items():
        members += [member(f"{key}.png", data), member(f"{key}.txt", b"a picture with nothing behind its header")]
        rows.append(_row(path, key, SAMPLE, decodes=False))
    write_members(path, members)
    return rows


def pillow_decodes(data: bytes) -> bool:
    """Whether Pillow decodes every frame."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")) as image:
            for frame in ImageSequence.Iterator(image):
                frame.load()
    except Exception:
        return False
    return True


def _cuts() -> Iterator[tuple[str, bytes, int]]:
    """Cuts in the magic, the header, every sixteenth of the rest, and the last bytes."""
    whole = kinds_of_files()
    for name in ("jpeg", "jpeg_progressive", "png", "webp"):
        data = whole[name]
        places = {0, 1, 2, 3, 4, 8, 11, 12, 16, 20, 24, 33, 64, *range(65, len(data), len(data) // 16)}
        for at in sorted(places | {len(data) - back for back in (1, 2, 3, 4, 8, 12, 13)}):
            yield name, data, at


def _odd() -> dict[str, bytes]:
    """Images that a sloppy reader trips over, whole or not."""
    image = photograph(640, 400, seed=3)
    jpeg, png = encoded(image, "JPEG"), encoded(image, "PNG")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    nested_exif = (
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\x08\0\0\0\0\0\0\0"  # a directory inside itself
    )
    turned_nowhere = Image.Exif()
    turned_nowhere[0x0112] = 99
    return {
        "icc": encoded(image, "JPEG", icc_profile=profile),
        "icc-garbage": encoded(image, "JPEG", icc_profile=b"\xff" * 3_000),
        "cmyk-icc-garbage": encoded(image.convert("CMYK"), "JPEG", icc_profile=b"prof\0"),
        "exif-garbage": encoded(image, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 200),
        "exif-in-itself": encoded(image, "JPEG", exif=nested_exif),
        "exif-turned-nowhere": encoded(image, "JPEG", exif=turned_nowhere.tobytes()),
        "png-exif-garbage": encoded(image, "PNG", exif=b"Exif\0\0" + b"\0" * 9),
        "png-in-jpg": png,
        "sixteen-bit-colour": _png(640, 400, 16, 2, bytes(400 * (1 + 640 * 6))),
        "grey-of-two-bits": _png(64, 40, 2, 0, bytes(40 * 17)),
        "one-pixel": encoded(photograph(1, 1), "PNG"),
        "65500-wide": encoded(Image.new("L", (65_500, 1)), "JPEG"),
        "65500-high": encoded(Image.new("L", (1, 65_500), 200), "JPEG"),
        "65535-wide-png": encoded(Image.new("1", (65_535, 3)), "PNG"),
        "50-megapixels-in-little": encoded(Image.new("1", (10_000, 5_000)), "PNG"),
        "many-frames": encoded(
            photograph(8, 8), "GIF", save_all=True, append_images=[photograph(8, 8, s) for s in range(99)]
        ),
        "zero-wide": _png(0, 10, 8, 2, b"\0" * 10),
        "empty": b"",
        "html": b"<html><script>alert(1)</script></html>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch planted) (w) file\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "nothing-but-a-start": b"\xff\xd8\xff",
        "junk-after-the-end": jpeg + random.Random(0).randbytes(999),
        "two-in-one": jpeg + png,
        "length-that-lies": jpeg[:2] + b"\xff\xe1\xff\xff" + jpeg[2:],
        "text-that-unpacks": _png(
            4, 4, 8, 0, bytes(20), _chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3 * 10**7), 9))
        ),
        "profile-that-unpacks": _png(
            4, 4, 8, 0, bytes(20), _chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(3 * 10**7), 9))
        ),
    }


def _bombs() -> dict[str, tuple[bytes, str]]:
    """Headers that announce more pixels than may be decoded, by the format's own rules."""
    gif = bytearray(encoded(photograph(8, 8), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    bmp = bytearray(encoded(photograph(8, 8), "BMP"))
    bmp[18:26] = struct.pack("<ii", 65_500, 65_500)
    jpeg = bytearray(encoded(photograph(8, 8), "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    tiff = encoded(Image.new("1", (20_000, 20_000)), "TIFF", compression="group4")
    vp8x = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (16_383).to_bytes(3, "little") * 2
    webp = b"RIFF" + struct.pack("<I", 4 + len(vp8x)) + b"WEBP" + vp8x
    bomb = "decompression_bomb"
    return {
        "bomb/png-65500": (_png(65_500, 65_500, 8, 2, b""), bomb),
        "bomb/png-of-billions": (_png(2**31 - 1, 2**31 - 1, 8, 2, b""), bomb),
        "bomb/png-that-decodes": (encoded(Image.new("1", (14_000, 14_000)), "PNG"), bomb),
        "bomb/jpeg-65500": (bytes(jpeg), bomb),
        "bomb/gif-canvas": (bytes(gif), bomb),
        "bomb/bmp": (bytes(bmp), bomb),
        "bomb/tiff": (tiff, bomb),
        "bomb/webp-canvas": (webp, bomb),
    }


def _hollow_png() -> bytes:
    """A PNG whose every checksum is right, and whose pixels can't be unpacked all the same."""
    parts = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", 300, 300, 8, 2, 0, 0, 0)),
        _chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 64),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + _chunk(b"IEND", b"")


def _png(width: int, height: int, bits: int, colour: int, scanlines: bytes, *more: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(scanlines))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + data + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


# -- captions -------------------------------------------------------------------------------------------------

CAPTIONS = {
    "hebrew": "שלום עולם זה כלב חום גדול",
    "arabic": "قطة بيضاء صغيرة على السجادة الحمراء",
    "right-to-left-override": "a photograph of \u202egpj.exe\u202c on a table",
    "left-open": "isolates \u2066 and embeddings \u202b that never end",
    "combining": "e" + "\u0301" * 5_000 + " with a pile of accents on it",
    "only-combining": "\u0301\u0301",
    "family": "👩‍👩‍👧‍👦 🏳️‍🌈 family at the beach",
    "not-characters": "\ufffe\uffff\U0010ffff and \ufdd0 in one caption",
    "nul": "a dog\0 and a cat\0\0",
    "controls": "".join(map(chr, range(1, 32))) + "\x7f\x85\u2028 controls",
    "megabyte": "word " * 2**18,
    "megabyte-of-one-word": "a" * 2**20,
    "lines": "one\r\ntwo\nthree\rfour",
    "markup": MARKUP + " a dog in a garden",
    "sql": INJECTION + " a dog in a garden",
    "formula": "=cmd|' /C calc'!A0 a dog in a garden",
    "template": "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "mathtext": r"costs $\frac{1}{0$ or $5 and \begin{a} in a garden",
    "zero-width": "\u200b\u200d\ufeff a dog in a garden",
    "byte-order-mark": "\ufeffa dog in a garden of roses",
}
BAD_CAPTIONS = {
    "not-utf8": (b"caf\xe9 \xff\xfe", "caption_not_utf8"),
    "surrogate-in-bytes": (b"\xed\xa0\x80 a dog", "caption_not_utf8"),
    "utf16": ("a dog in a garden".encode("utf-16"), "caption_not_utf8"),
    "blank": (b" \t\r\n\x0b\x0c", "missing_caption"),
    "unicode-blank": ("\u2003\u3000".encode(), "missing_caption"),
    "too-large": (b"a" * (16 * 2**20 + 1), "too_large"),
    "an-image": (encoded(photograph(9, 9), "JPEG"), "caption_not_utf8"),
}


def _write_captions(path: Path) -> list[Row]:
    """A tar with a good image a row, whose name asks for trouble as well."""
    captions = {name: (text.encode(), SAMPLE) for name, text in CAPTIONS.items()} | BAD_CAPTIONS
    members, rows = [], []
    for number, (key, (caption, fate)) in enumerate(captions.items()):
        members += [member(f"{key}.jpg", _good(100 + number)), member(f"{key}.txt", caption)]
        rows.append(_row(path, key, fate))
    write_members(path, members)
    return rows


def _good(seed: int) -> bytes:
    return encoded(photograph(240, 220, seed=seed), "JPEG")


# -- names ----------------------------------------------------------------------------------------------------


def _write_names(path: Path, outside: Path) -> list[Row]:
    """A tar whose members lead elsewhere, come twice, or are no files."""
    planted = f"{outside}/planted"
    names = [
        planted,
        "../../../../../../tmp/../planted",
        "a/./b//c",
        MARKUP.replace("/", "|"),
        INJECTION,
        "nul\N{SYMBOL FOR NULL}ed",
        "שלום/\u202egpj",
        "x" * 3_000,
        os.fsdecode(b"caf\xe9\xff"),
        "C:\\windows\\system32\\con",
        "-rf",
        "~root",
    ]
    members, rows = [], []
    for number, name in enumerate(names):
        image = member(f"{name}.jpg", _good(200 + number))
        members += [image, member(f"{name}.txt", f"a picture of place number {number} in the list".encode())]
        rows.append(_row(path, valid_text(name), SAMPLE))
    links = {"hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE, "device": tarfile.CHRTYPE, "pipe": tarfile.FIFOTYPE}
    for name, kind in links.items():
        members.append(member(f"{name}.jpg", type=kind, linkname=f"{outside}/secret.jpg"))
        members.append(member(f"{name}.txt", b"a picture that is not there"))
        rows.append(_row(path, name, "not_a_file"))
    members.append(member("soft-folder", type=tarfile.SYMTYPE, linkname=str(outside)))
    rows.append(_row(path, "", "not_a_file"))
    members += [member("soft-folder/planted.jpg", _good(300)), member("soft-folder/planted.txt", b"through a link")]
    rows.append(_row(path, "soft-folder/planted", SAMPLE))
    for number in range(3):  # one key, three samples; and one of them again, which is known then
        members += [member("twice.jpg", _good(301 + number % 2)), member("twice.txt", f"caption {number}".encode())]
        rows.append(_row(path, "twice", SAMPLE))
    members += [member("twice.jpg", _good(301)), member("twice.txt", b"caption 0")]
    rows.append(_row(path, "twice", SAMPLE))
    write_members(path, members)
    return rows


# -- tables and lines -----------------------------------------------------------------------------------------


def _write_tables(folder: Path) -> list[Row]:
    """Parquet files, each of another schema, with nulls and wrong types."""
    good = [_good(400 + number) for number in range(8)]
    rows: list[Row] = []

    def write(name: str, columns: dict[str, object], *fates: tuple[str, str]) -> None:
        path = folder / name
        pq.write_table(pa.table(columns), path)
        rows.extend(_row(path, key, fate) for key, fate in fates)

    write(
        "nulls.parquet",
        {
            "key": ["n0", None, "n2", "n3"],
            "jpg": pa.array([None, good[0], good[1], good[2]], pa.binary()),
            "caption": ["no image here", "no key here at all", None, "all is here and well"],
        },
        ("n0", "missing_image"),
        (_key_of(good[0]), SAMPLE),
        ("n2", "missing_caption"),
        ("n3", SAMPLE),
    )
    write(
        "structs.parquet",
        {
            "image": [{"bytes": good[3], "path": "../../etc/passwd"}, {"bytes": None, "path": "/etc/passwd"}, None],
            "text": ["a picture with a strange path", "a path that leads away", "nothing"],
            "id": pa.array([2**63 - 1, -1, None], pa.int64()),
            "nested": [{"a": [1.5, None]}, {"a": [float("nan")]}, None],
        },
        (str(2**63 - 1), SAMPLE),
        ("-1", "outside_source"),
        ("", "missing_image"),
    )
    write(
        "captions-are-numbers.parquet",
        {"key": ["t0", "t1"], "jpg": good[4:6], "caption": pa.array([7, None], pa.int64())},
        ("t0", "caption_not_text"),
        ("t1", "missing_caption"),
    )
    write(
        "captions-are-lists.parquet",
        {"key": ["l0", "l1"], "jpg": good[4:6], "caption": [["a list"], []]},
        ("l0", "caption_not_text"),
        ("l1", "caption_not_text"),
    )
    write(
        "images-are-numbers.parquet",
        {"key": ["i0", "i1"], "image": pa.array([7, None], pa.int64()), "caption": ["a number", "nothing"]},
        ("i0", "not_an_image"),
        ("i1", "missing_image"),
    )
    bad_text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(struct.pack("<ii", 0, 2)), pa.py_buffer(b"\xff\xfe")]
    )
    write("not-utf8.parquet", {"key": ["u0"], "jpg": good[6:7], "caption": bad_text}, ("u0", "caption_not_utf8"))
    write(
        "empty.parquet",
        {"key": pa.array([], pa.string()), "jpg": pa.array([], pa.binary()), "caption": pa.array([], pa.string())},
    )
    write(
        f"{MARKUP.replace('/', '|')}.parquet",
        {"key": [MARKUP, INJECTION], "jpg": [good[7], b"GIF89a"], "caption": [MARKUP, INJECTION], "a'b\"c": ["1", "2"]},
        (MARKUP, SAMPLE),
        (INJECTION, "truncated"),
    )
    return rows


def _key_of(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:16]


def _write_lines(path: Path, outside: Path) -> list[Row]:
    """JSON lines whose paths lead away, of mixed types, and not JSON at all."""
    (path.parent / "pictures").mkdir()
    (path.parent / "pictures" / "a.jpg").write_bytes(_good(500))
    os.mkfifo(path.parent / "pictures" / "pipe.jpg")
    caption = "a picture that a line names"
    lines: list[tuple[dict[str, object], str]] = [
        ({"key": "good", "image_path": "pictures/a.jpg", "caption": caption}, SAMPLE),
        ({"key": "absolute", "image_path": f"{outside}/secret.jpg", "caption": caption}, "outside_source"),
        ({"key": "parent", "image_path": f"../{outside.name}/secret.jpg", "caption": caption}, "outside_source"),
        ({"key": "url", "image_path": f"file://{outside}/secret.jpg", "caption": caption}, "outside_source"),
        ({"key": "device", "image_path": "/dev/zero", "caption": caption}, "outside_source"),
        ({"key": "pipe", "image_path": "pictures/pipe.jpg", "caption": caption}, "missing_file"),
        ({"key": "folder", "image_path": "pictures", "caption": caption}, "missing_file"),
        ({"key": "nul", "image_path": "pictures/a.jpg\0.png", "caption": caption}, "missing_file"),
        ({"key": "number", "image_path": 7, "caption": caption}, "missing_image"),
        ({"key": "list", "image_path": "pictures/a.jpg", "caption": [caption]}, "caption_not_text"),
        ({"key": "surrogate", "image_path": "pictures/a.jpg", "caption": "\ud800 alone"}, "caption_not_utf8"),
        ({"key": "other fields", "image_path": "pictures/a.jpg", "caption": caption, "x": 1e999, "": None}, SAMPLE),
        ({"key": "none"}, "missing_image"),
    ]
    write_lines(path, [fields for fields, _ in lines])
    rows = [_row(path, str(fields["key"]), fate) for fields, fate in lines]
    deep = b'{"key": "deep", "x": ' + b"[" * 10**6 + b"]" * 10**6 + b"}"
    with path.open("ab") as file:
        file.write(b"\n\n{\n[1, 2]\nnull\n\0\n" + deep + b"\n")
    return [*rows, *(_row(path, "", "bad_json") for _ in range(5))]


def _write_broken(folder: Path) -> list[Row]:
    """Files that are not what their name says, or break off."""
    rows = []
    for name in ("text.tar", "prose.parquet", "text.tar.gz"):
        (folder / name).write_bytes(b"this is neither an archive nor a table\n" * 99)
        rows.append(_row(folder / name, "", "broken_archive"))
    (folder / "zeros.tar.gz").write_bytes(zlib.compress(bytes(10**8), 9, 31))  # an archive of nothing but its end
    (folder / "nothing.jsonl").write_bytes(b"")
    (folder / "nothing.tar").write_bytes(b"")
    rows.append(_row(folder / "nothing.tar", "", "broken_archive"))
    whole = write_members(
        folder / "cut.tar", [member("a.jpg", _good(600)), member("a.txt", b"a picture before the cut")]
    )
    with whole.open("r+b") as file:
        file.truncate(len(_good(600)) // 2)
    rows += [_row(whole, "", "broken_archive")]
    return rows
