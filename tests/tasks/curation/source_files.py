"""Writes small sources of every format for the tests of ingest."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Pair = tuple[str, bytes, str]
"""Key, image bytes, caption."""


def picture(seed: int, format: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    """Return an image of noise: its bytes differ for every seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype="uint8")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def pairs(count: int, first: int = 0) -> list[Pair]:
    """Return distinct pairs, keys as img2dataset writes them."""
    return [(f"{i:09d}", picture(i), f"caption {i}") for i in range(first, first + count)]


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def write_members(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


def write_tar(path: Path, samples: Iterable[Pair], mode: str = "w") -> Path:
    """Write an archive as img2dataset does: image, text and JSON of each sample."""
    members = []
    for key, image, caption in samples:
        fields = {"caption": caption, "url": f"https://example.org/{key}", "width": 24, "status": "success"}
        members += [
            member(f"{key}.jpg", image),
            member(f"{key}.txt", caption.encode()),
            member(f"{key}.json", json.dumps(fields).encode()),
        ]
    return write_members(path, members, mode)


def write_parquet(path: Path, samples: Iterable[tuple[str, bytes | None, str]], **columns: list[object]) -> Path:
    """Write a table as img2dataset does."""
    keys, images, captions = (list(column) for column in zip(*samples, strict=True))
    images = pa.array(images, pa.binary())
    table = pa.table({"key": keys, "jpg": images, "caption": captions, "txt": captions, **columns})
    pq.write_table(table, path)
    return path


def write_jsonl(path: Path, samples: Iterable[Pair]) -> Path:
    """Write lines of key, image_path and caption, and the images beside them."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for key, image, caption in samples:
        (path.parent / "images" / f"{key}.jpg").write_bytes(image)
        lines.append({"key": key, "image_path": f"images/{key}.jpg", "caption": caption})
    return write_lines(path, lines)


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_folder(path: Path, samples: Iterable[Pair]) -> Path:
    """Write images with text files beside them."""
    path.mkdir(parents=True, exist_ok=True)
    for key, image, caption in samples:
        (path / f"{key}.jpg").write_bytes(image)
        (path / f"{key}.txt").write_text(caption)
    return path


def write_dataset(path: Path, samples: Iterable[Pair]) -> Path:
    """Save a Hugging Face dataset with an Image feature."""
    keys, images, captions = (list(column) for column in zip(*samples, strict=True))
    features = datasets.Features(
        {"key": datasets.Value("string"), "image": datasets.Image(), "caption": datasets.Value("string")}
    )
    rows = {"key": keys, "image": [{"bytes": image, "path": None} for image in images], "caption": captions}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)
    return path
