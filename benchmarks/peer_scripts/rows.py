"""The chain as a script that a user would write: a function over one row, in a process a core, and a set of hashes.

`python rows.py SETTINGS RESULT`, both JSON files; it needs Pillow and imagehash.
"""

import json
import os
import sys
import time
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import imagehash
from PIL import Image


def judge(row: dict, limits: dict) -> str | None:
    """Return a row's pHash if it passes every filter."""
    caption = row["caption"]
    if len(caption.split()) < limits["words_min"]:
        return None
    special = sum(not (character.isalnum() or character.isspace()) for character in caption)
    if special > limits["special_max"] * len(caption):
        return None
    with Image.open(row["image"]) as image:
        if min(image.size) < limits["side_min"] or max(image.size) > limits["aspect_max"] * min(image.size):
            return None
        return str(imagehash.phash(image))


def main(settings: dict, result: Path) -> None:
    """Run the chain and write the keys it keeps and its seconds."""
    began = time.perf_counter()
    rows = []
    for source in map(Path, settings["sources"]):
        for row in map(json.loads, source.read_text().splitlines()):
            rows.append({**row, "image": str(source.parent / row["image_path"])})
    with Pool(len(os.sched_getaffinity(0))) as pool:
        hashes = pool.map(partial(judge, limits=settings["thresholds"]), rows, chunksize=32)
    seen, kept = set(), []
    for row, found in zip(rows, hashes, strict=True):
        if found is not None and found not in seen:
            seen.add(found)
            kept.append(row["key"])
    result.write_text(json.dumps({"seconds": time.perf_counter() - began, "kept": sorted(kept)}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
