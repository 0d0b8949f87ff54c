"""Small images of every kind, and batches made of them, for the tests of signals and scoring."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from storage.refs import ShardRef
from storage.schema import SAMPLES
from storage.warehouse import Warehouse
from tasks.curation.batch import Batch, Needs, read_batches
from tasks.curation.decode import EncodedImage, Pixels
from tasks.curation.signals.contract import Signal

ORIENTATION = 0x0112


def photograph(width: int = 97, height: int = 61, seed: int = 0) -> Image.Image:
    """An RGB image with coarse and fine structure in every channel."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as a file of Pillow's format `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes) -> Pixels:
    """An image file's pixels, as a signal's view gets them."""
    return Pixels(EncodedImage(data), lambda header: np.empty(3 * header.width * header.height, np.uint8))


def oriented(image: Image.Image, kind: str, orientation: int) -> bytes:
    """The image's pixels as they are, with an Exif tag that says how to turn them."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def kinds_of_files() -> dict[str, bytes]:
    """One file of every kind that a pool holds, all of the same 97 x 61 photograph or made from it."""
    image = photograph()
    grey16 = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    frames = [photograph(seed=seed) for seed in (1, 2)]
    return {
        "jpeg": encoded(image, "JPEG", quality=90),
        "jpeg_444": encoded(image, "JPEG", quality=90, subsampling=0),
        "jpeg_progressive": encoded(image, "JPEG", progressive=True),
        "jpeg_grey": encoded(image.convert("L"), "JPEG"),
        "jpeg_cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "jpeg_rgb": encoded(image, "JPEG", keep_rgb=True),
        "jpeg_turned": oriented(image, "JPEG", 6),
        "jpeg_junk_behind": encoded(image, "JPEG") + b"junk",
        "mpo": encoded(image, "MPO", save_all=True, append_images=frames),
        "png": encoded(image, "PNG"),
        "png_16_bit": encoded(grey16, "PNG"),
        "png_palette": encoded(image.quantize(64), "PNG"),
        "png_palette_transparent": encoded(image.quantize(64), "PNG", transparency=bytes(range(64))),
        "png_alpha": encoded(Image.merge("RGBA", (*image.split(), image.split()[0])), "PNG"),
        "png_grey_alpha": encoded(image.convert("LA"), "PNG"),
        "png_bilevel": encoded(image.convert("1"), "PNG"),
        "png_turned": oriented(image, "PNG", 8),
        "webp": encoded(image, "WEBP", quality=80),
        "webp_animated": encoded(image, "WEBP", save_all=True, append_images=frames),
        "gif": encoded(image, "GIF"),
        "gif_animated": encoded(image, "GIF", save_all=True, append_images=frames),
        "bmp": encoded(image, "BMP"),
        "tiff": encoded(image, "TIFF"),
        "tiff_turned": oriented(image, "TIFF", 3),
        "avif": encoded(image, "AVIF"),
    }


def write_shard(
    warehouse: Warehouse,
    images: Sequence[bytes],
    captions: Sequence[str | None] | None = None,
    *,
    name: str = "shard",
) -> ShardRef:
    """Write a shard of pool `pool` with one sample an image."""
    captions = captions or [f"a picture of number {number}" for number in range(len(images))]
    rows = [
        {
            "sample_id": f"{number:032x}",
            "key": f"key {number}",
            "image": {"bytes": image, "path": None},
            "caption": caption,
            "source": {"path": "source.tar", "member": str(number)},
        }
        for number, (image, caption) in enumerate(zip(images, captions, strict=True))
    ]
    shard = ShardRef("pool", name, len(rows))
    warehouse.write_table(shard.path, pa.Table.from_pylist(rows, SAMPLES))
    return shard


def measured(
    signal: Signal,
    warehouse: Warehouse,
    images: Sequence[bytes] = (),
    captions: Sequence[str | None] | None = None,
) -> list[dict[str, Any]]:
    """What a signal measures of samples, a dict a sample, through the reading and decoding that scoring does."""
    if signal.needs is Needs.NOTHING and not images:
        return signal.measure(Batch(pa.array(captions, pa.string()))).to_pylist()
    shard = write_shard(warehouse, images, captions)
    with warehouse.open_parquet(shard.path) as parquet:
        return [
            row
            for read in read_batches(parquet, [signal], threads=1)
            for row in signal.measure(read.for_signal(signal)).to_pylist()
        ]
