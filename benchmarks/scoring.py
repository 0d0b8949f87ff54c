"""Images a second for all signals that need no model, beside Pillow's decoding alone and beside a plain loop.

    python -m benchmarks.scoring

All three look at the same 640 x 480 JPEGs, noise with the spectrum of photographs and edges on it, with captions. Each
round runs them one after another, and the ratios reported are medians over the rounds, so that what else the machine
does meanwhile weighs on all three.

- `score`: `score_shard` for size, caption, characters, words, language, exact and perceptual, from a shard in a
  warehouse on disk to the seven signals' tables in it, with `score_shard`'s own number of threads.
- `decode`: the same bytes, in memory, through `PIL.Image.open(...).load()`, with one thread a core.
- `loop`: a row at a time in one process: sha256, size, Pillow, `imagehash.phash`, `ftlangdetect.detect`.
"""

import argparse
import hashlib
import io
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import ftlangdetect
import imagehash
import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageOps

from benchmarks.record import record
from storage import schema
from storage.refs import ShardRef
from storage.warehouse import Warehouse
from tasks.curation.score import score_shard
from tasks.curation.signals import Signal, SignalSettings, build_signals
from tasks.curation.signals.language import place_model

WIDTH, HEIGHT = 640, 480
_THREADS = len(os.sched_getaffinity(0))
_NOUNS = (
    "bicycle",
    "bridge",
    "castle",
    "garden",
    "guitar",
    "harbour",
    "market",
    "mountain",
    "river",
    "station",
    "tower",
)
_TEMPLATES = (
    "An old {} beside a {} in the evening light, seen from the other side of the water",
    "Two people walking past a {} and a {} on a rainy day",
    "Ein alter {} neben einem {} im Abendlicht, vom anderen Ufer aus gesehen",
    "Una vista del {} y del {} al atardecer desde la otra orilla",
)


def photograph(rng: np.random.Generator) -> Image.Image:
    """Return noise with a natural image's spectrum, power falling with the square of frequency, and some edges."""
    vertical, horizontal = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None, :]
    frequency = np.hypot(vertical, horizontal)
    frequency[0, 0] = 1 / WIDTH

    def layer(steepness: float) -> np.ndarray:
        spectrum = rng.normal(size=(2, *frequency.shape))
        field = np.fft.irfft2((spectrum[0] + 1j * spectrum[1]) / frequency**steepness, s=(HEIGHT, WIDTH))
        return (field - field.mean()) / field.std()

    light, red, blue = layer(1.2), layer(1.6), layer(1.6)
    colours = np.stack([light + 0.4 * red, light - 0.2 * (red + blue), light + 0.4 * blue], axis=-1)
    image = Image.fromarray(np.clip(colours * 45 + 120, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x, y, radius, *colour in zip(
        *(rng.integers(0, limit, 12) for limit in (WIDTH, HEIGHT, 120, 256, 256, 256)), strict=True
    ):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=tuple(map(int, colour)))
    return image


def samples(count: int) -> list[dict[str, object]]:
    """Return rows of a shard with `count` distinct images: mirrored and re-encoded variants of an eighth as many."""
    rng, choose = np.random.default_rng(0), random.Random(0)
    rows: list[dict[str, object]] = []
    while len(rows) < count:
        image = photograph(rng)
        for is_mirrored, is_flipped, quality in product((False, True), (False, True), (80, 88)):
            variant = ImageOps.mirror(image) if is_mirrored else image
            buffer = io.BytesIO()
            (ImageOps.flip(variant) if is_flipped else variant).save(buffer, "JPEG", quality=quality)
            number = len(rows)
            rows.append(
                {
                    "sample_id": f"{number:032x}",
                    "key": str(number),
                    "image": {"bytes": buffer.getvalue(), "path": f"{number}.jpg"},
                    "caption": choose.choice(_TEMPLATES).format(*choose.sample(_NOUNS, 2)),
                }
            )
    return rows[:count]


def decode_all(images: Sequence[bytes]) -> None:
    """Decode with Pillow, one thread a core."""
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(_decode_some, [images[start : start + 8] for start in range(0, len(images), 8)]))


def _decode_some(images: Sequence[bytes]) -> None:
    for data in images:
        Image.open(io.BytesIO(data)).load()


def plain_loop(rows: Sequence[dict[str, object]]) -> list[tuple[object, ...]]:
    """Measure a row at a time with the libraries everybody uses."""
    found = []
    for row in rows:
        data, caption = row["image"]["bytes"], row["caption"]  # type: ignore[index]
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        language = ftlangdetect.detect(caption, low_memory=True)
        digest, phash = hashlib.sha256(data).hexdigest(), imagehash.phash(image)
        found.append((image.size, len(caption.split()), language["lang"], digest, phash))
    return found


def score_all(shard: ShardRef, signals: Sequence[Signal], warehouse: Warehouse) -> None:
    """Score a shard of which nothing is measured yet."""
    for signal in signals:
        warehouse.local_path(signal.ref.table(shard)).unlink(missing_ok=True)
    assert not any(outcome.cached for outcome in score_shard(shard, signals, warehouse=warehouse))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    place_model()
    rows = samples(arguments.images)
    images = [row["image"]["bytes"] for row in rows]  # type: ignore[index]
    some = rows[: max(1, len(rows) // 5)]  # the loop is slow, and as fast a row for a fifth of them
    signals = build_signals(
        SignalSettings(measure=("size", "caption", "characters", "words", "language", "exact", "perceptual"))
    )
    rates: dict[str, list[float]] = {"score": [], "decode": [], "loop": []}
    with tempfile.TemporaryDirectory() as folder:
        warehouse, shard = Warehouse(folder), ShardRef("benchmark", "photographs", len(rows))
        warehouse.write_table(shard.path, pa.Table.from_pylist(rows, schema.SAMPLES))
        score_all(shard, signals, warehouse)
        for _ in range(arguments.rounds):
            rates["decode"].append(len(images) / _seconds(lambda: decode_all(images)))
            rates["score"].append(len(rows) / _seconds(lambda: score_all(shard, signals, warehouse)))
            rates["loop"].append(len(some) / _seconds(lambda: plain_loop(some)))

    medians = {name: statistics.median(found) for name, found in rates.items()}
    to_decode = statistics.median(s / d for s, d in zip(rates["score"], rates["decode"], strict=True))
    to_loop = statistics.median(s / one for s, one in zip(rates["score"], rates["loop"], strict=True))
    for name, rate in medians.items():
        print(f"{name:8} {rate:8.0f} images/s")
    print(f"score is {to_decode:.2f} x decoding alone and {to_loop:.1f} x the loop")
    record(
        "scoring",
        {
            "ratio_to_decode": round(to_decode, 3),
            "ratio_to_loop": round(to_loop, 2),
            **{f"{name}_images_per_second": round(rate) for name, rate in medians.items()},
        },
        images=len(rows),
        mean_bytes=round(statistics.mean(map(len, images))),
        rounds=arguments.rounds,
        threads={"score": f"{_THREADS + 1} decode, 1 measures", "decode": _THREADS, "loop": 1},
        all_images_per_second={name: [round(rate) for rate in found] for name, found in rates.items()},
    )


if __name__ == "__main__":
    main()
