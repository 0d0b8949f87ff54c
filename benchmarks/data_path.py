"""The data path of a training at Gemma 4's 280 tokens an image: 640×480 JPEGs from shards to batches, against a loop.

Also what counting tokens takes, and how much of a batch is padding with and without like lengths together.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.gpu.scenes import publish_scenes
from benchmarks.record import record
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.batches import PaddedCollator, TokenBatches
from tasks.training.conversations import make_collator
from tasks.training.dataset import read_examples, write_examples
from tasks.training.lengths import count_tokens
from tasks.training.recipe import Recipe
from tasks.training.template import render_prompt

SAMPLE = Path("tasks/sample_models/gemma")
IMAGE_TOKENS, POOLING = 280, 3
TOKENS_PER_BATCH = 4096
ROUNDS = 3


def main() -> None:
    """Measure, print and record the figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_path", description=__doc__)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    processor: Any = models.load_processor(SAMPLE, Recipe(base_model="sample", max_image_tokens=IMAGE_TOKENS))
    processor.image_processor.pooling_kernel_size = POOLING
    with tempfile.TemporaryDirectory() as folder:
        rows = scenes(Path(folder), arguments.samples)
        collator = make_collator(processor, rows, (1,))
        counting = [
            seconds(lambda: count_tokens(rows, processor, collator, workers=arguments.workers)) for _ in range(ROUNDS)
        ]
        lengths = count_tokens(rows, processor, collator)
        batches = TokenBatches(lengths, rows["sample_id"], tokens=TOKENS_PER_BATCH, seed=0)
        padded = PaddedCollator(collator, processor.tokenizer.pad_token_id)
        loader = DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=padded,
            num_workers=arguments.workers,
            persistent_workers=True,
            multiprocessing_context="fork",
        )
        consume(loader)  # the workers start
        loaded = [seconds(lambda: consume(loader)) for _ in range(ROUNDS)]
        looped = [seconds(lambda: consume(plain_loop(rows, processor))) for _ in range(ROUNDS)]
    per_second = arguments.samples / median(loaded)
    figures: dict[str, float | int | str] = {
        "loader_samples_per_second": round(per_second, 1),
        "loader_samples_per_second_and_worker": round(per_second / arguments.workers, 1),
        "loop_samples_per_second": round(arguments.samples / median(looped), 1),
        "ratio_to_loop": round(median(looped) / median(loaded), 2),
        "count_samples_per_second": round(arguments.samples / median(counting)),
        "mean_tokens": round(float(lengths.mean()), 1),
        **padding_figures(),
    }
    for name, value in figures.items():
        print(f"{name:40} {value}")
    record(
        "data_path",
        figures,
        samples=arguments.samples,
        workers=arguments.workers,
        rounds=ROUNDS,
        tokens_per_batch=TOKENS_PER_BATCH,
        seconds=f"loader: {sorted(round(s, 2) for s in loaded)}; loop: {sorted(round(s, 2) for s in looped)}",
    )


def scenes(folder: Path, samples: int) -> Dataset:
    """Publish drawn scenes as JPEGs of 640×480 pixels in a shard, and return them as a training reads them."""
    warehouse = Warehouse(str(folder))
    snapshot = publish_scenes(warehouse, samples=samples, size=(640, 480))
    recipe = Recipe(base_model="sample")
    return read_examples(
        write_examples(snapshot, recipe, split="train", warehouse=warehouse, path=folder / "examples.arrow").path
    )


def plain_loop(rows: Dataset, processor: Any) -> Iterable[Any]:
    """What a script does: open an image, render the chat, call the processor; batches of 8 in this process."""
    raw = rows.with_format("arrow")
    for start in range(0, len(rows), 8):
        chosen = [raw[at].to_pylist()[0] for at in range(start, min(start + 8, len(rows)))]
        images = [[Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")] for row in chosen]
        text = [render_prompt(processor, row) + row["completion"][0]["content"] + "<turn|>" for row in chosen]
        yield processor(images=images, text=text, padding=True, return_tensors="pt")


def padding_figures() -> dict[str, float]:
    """Share of padding for captions whose lengths are spread as those of web pages are (log-normal)."""
    rng = np.random.default_rng(0)
    lengths = IMAGE_TOKENS + 20 + np.clip(rng.lognormal(3.5, 1.0, 20_000), 1, 1500).astype(int)
    grouped = list(TokenBatches(lengths, [""] * len(lengths), tokens=8192, seed=0))
    rows = len(lengths) // len(grouped)
    at_random = [batch.tolist() for batch in np.array_split(rng.permutation(len(lengths)), len(lengths) // rows)]

    def share(batches: list[list[int]], multiple: int) -> float:
        padded = sum(-(-int(lengths[batch].max()) // multiple) * multiple * len(batch) for batch in batches)
        return round(1 - float(lengths.sum()) / padded, 3)

    return {"padding_share_grouped": share(grouped, 64), "padding_share_at_random": share(at_random, 1)}


def consume(batches: Iterable[Any]) -> None:
    """Take every batch."""
    for _ in batches:
        pass


def seconds(work: Any) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
