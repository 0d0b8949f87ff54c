"""Sample documents: scenes and sentences about them, in the shape of MMC4 or OBELICS, with a known fault now and then.

Each sentence about a scene names what its picture shows, so it is known which image belongs to which text.
"""

import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.scene import Scene, describe, draw_scene, draw_unlike, render
from tasks.curation.scene_languages import describe_in

FAULTS = ("", "missing_image", "small_image", "junk_text", "foreign", "no_images")
"""What can be wrong with a document: one of its images, one of its texts, all texts, or that it has no images."""

FILLER = "It was made to show how simple shapes look when they are put next to each other."
JUNK = "IMG_0371.JPG 1024x768 >>> 12/37"


@dataclass(frozen=True)
class PlantedDocument:
    """A document that was written: its fault (empty for none), and for each image the number of its text."""

    key: str
    fault: str
    images: tuple[int, ...]


def write_sample_documents(
    folder: Path, *, documents: int = 24, seed: int = 0, shape: Literal["mmc4", "obelics"] = "mmc4"
) -> list[PlantedDocument]:
    """Write documents to `folder`, every fault in turn: `documents.jsonl` with `images/`, or `documents.parquet`.

    In MMC4's shape images come in no order and are matched to nothing; in OBELICS's each stands before its text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    planted, rows = [], []
    for number in range(documents):
        rng = random.Random(f"document {seed} {number}")
        fault = FAULTS[number % len(FAULTS)]
        key = f"https://example.com/pages/{number:05d}.html"
        scenes = _scenes(rng)
        is_foreign = fault == "foreign"
        said = [(describe_in("de", s, rng) if is_foreign else describe(s, rng), at) for at, s in enumerate(scenes)]
        said.insert(rng.randrange(len(said) + 1), (describe_in("de", scenes[0], rng) if is_foreign else FILLER, -1))
        if fault == "junk_text":
            said.append((JUNK, -1))
        texts = [text for text, _ in said]
        own = [[about for _, about in said].index(scene) for scene in range(len(scenes))]
        pictures = [] if fault == "no_images" else [_picture(scene, rng) for scene in scenes]
        if fault == "small_image":
            pictures[0] = _picture(scenes[0], rng, side=100)
        row = _mmc4 if shape == "mmc4" else _obelics
        order = rng.sample(range(len(pictures)), len(pictures)) if shape == "mmc4" else range(len(pictures))
        images = [(own[at], b"" if fault == "missing_image" and at == 0 else pictures[at]) for at in order]
        rows.append(row(folder, number, key, texts, images))
        planted.append(PlantedDocument(key, fault, tuple(text for text, _ in images)))
    if shape == "mmc4":
        (folder / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "documents.parquet")
    return planted


def _scenes(rng: random.Random) -> list[Scene]:
    """Two to four scenes, each unlike the one before."""
    scenes = [draw_scene(rng)]
    for _ in range(rng.randint(1, 3)):
        scenes.append(draw_unlike(scenes[-1], rng))
    return scenes


def _picture(scene: Scene, rng: random.Random, side: int = 224) -> bytes:
    buffer = io.BytesIO()
    render(scene, size=(side, side), seed=rng.getrandbits(64)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


Images = Sequence[tuple[int, bytes]]
"""The number of the text that each image belongs to, and its bytes, none for one that is missing."""


def _mmc4(folder: Path, number: int, key: str, texts: list[str], images: Images) -> dict[str, Any]:
    """A line as MMC4 has it; an image that is missing is named and not written."""
    (folder / "images").mkdir(exist_ok=True)
    infos = []
    for at, (_, data) in enumerate(images):
        name = f"images/{number:05d}_{at}.jpg"
        if data:
            (folder / name).write_bytes(data)
        infos.append({"image_name": name, "raw_url": f"https://example.com/{name}", "face_detections": None})
    return {"url": key, "text_list": texts, "image_info": infos}


def _obelics(_: Path, number: int, key: str, texts: list[str], images: Images) -> dict[str, Any]:
    """A row as OBELICS has it, but with the images' bytes; one that is missing is null in both lists."""
    sides: list[tuple[dict[str, Any] | None, str | None]] = []
    by_text: dict[int, list[bytes]] = {}
    for place, data in images:
        by_text.setdefault(place, []).append(data)
    for at, text in enumerate(texts):
        sides += [
            ({"bytes": data, "path": f"{number:05d}_{at}.jpg"} if data else None, None) for data in by_text.get(at, [])
        ]
        sides.append((None, text))
    return {
        "images": [image for image, _ in sides],
        "texts": [text for _, text in sides],
        "general_metadata": json.dumps({"url": key}),
    }
