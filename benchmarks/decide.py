"""Deciding on a million samples with the default policy: the first time, with another threshold, and again.

Evidence is synthetic: signals in the layout of a warehouse, a fifth of the samples in groups of copies, 100,000 equal
images among them, and near pairs between groups. `load` tells how busy the machine was with other work.
"""

import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.record import record
from storage.record import read_record
from storage.refs import PairsRef, PoolRef, ShardRef, SignalRef
from storage.schema import PAIRS, SAMPLES
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.policy import Policy, load_policy

SAMPLES_IN_ALL, SHARDS, EQUAL_IMAGES = 1_000_000, 100, 100_000
POLICY = Path(__file__).parent.parent / "deployments" / "policies" / "default.yaml"


def main() -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory(prefix="tamis-") as folder:
        warehouse = Warehouse(folder)
        pool, signals, pairs = make_evidence(warehouse, np.random.default_rng(0))
        policy = load_policy(POLICY)

        def seconds(policy: Policy) -> float:
            begin = time.perf_counter()
            decide(pool, policy, signals, pairs, warehouse=warehouse)
            return round(time.perf_counter() - begin, 2)

        figures: dict[str, float | int | str] = {"samples": SAMPLES_IN_ALL, "first_seconds": seconds(policy)}
        processor = time.process_time()
        figures |= {
            "other_threshold_seconds": seconds(policy.with_parameters({"clip_min": 0.25})),
            "other_threshold_cpu_seconds": round(time.process_time() - processor, 2),
            "cached_seconds": seconds(policy),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        }
        decisions = decide(pool, policy, signals, pairs, warehouse=warehouse).ref
        counts = read_record(warehouse, decisions.record).counts
    path = record(
        "decide", figures, shards=SHARDS, pairs=[pair.kind for pair in pairs], counts=dict(counts), load=os.getloadavg()
    )
    print(*(f"{name:26} {value:>12,}" for name, value in figures.items()), path, sep="\n")


def make_evidence(warehouse: Warehouse, rng: np.random.Generator) -> tuple[PoolRef, list[SignalRef], list[PairsRef]]:
    """Write a pool without images, its signals' tables and its pairs."""
    digits = rng.integers(0, 256, (SAMPLES_IN_ALL, 16), np.uint8).tobytes().hex()
    ids = pa.array([digits[at : at + 32] for at in range(0, len(digits), 32)])
    rows = SAMPLES_IN_ALL // SHARDS
    pool = PoolRef("pool", tuple(ShardRef("pool", f"{at:016x}", rows) for at in range(SHARDS)))
    signals = [SignalRef(name, "1") for name in columns_of(rng, 1)]
    for at, shard in enumerate(pool.shards):
        sample_id = ids.slice(at * rows, rows)
        samples = pa.table(
            {"sample_id": sample_id, **{n: pa.nulls(rows, SAMPLES.field(n).type) for n in SAMPLES.names[1:]}}
        )
        warehouse.write_table(shard.path, samples.cast(SAMPLES))
        for signal, (_, columns) in zip(signals, columns_of(rng, rows).items(), strict=True):
            warehouse.write_table(signal.table(shard), pa.table({"sample_id": sample_id, **columns}))
    groups = rng.permutation(SAMPLES_IN_ALL)[: SAMPLES_IN_ALL // 5]
    star = groups[:EQUAL_IMAGES]
    small = groups[EQUAL_IMAGES:].reshape(-1, 4)
    equal = np.concatenate(
        [np.stack([np.full(len(star) - 1, star[0]), star[1:]], 1), *(small[:, [0, at]] for at in (1, 2, 3))]
    )
    near = np.stack([small[:-1, 0], small[1:, 0]], 1)[::2]
    pairs = [
        write_pairs(warehouse, ids, "bytes", equal[::2], np.zeros(len(equal[::2]))),
        write_pairs(warehouse, ids, "pixels", equal, np.zeros(len(equal))),
        write_pairs(
            warehouse, ids, "perceptual", np.concatenate([equal, near]), np.repeat([0, 4], [len(equal), len(near)])
        ),
    ]
    return pool, signals, pairs


def columns_of(rng: np.random.Generator, rows: int) -> dict[str, dict[str, pa.Array]]:
    """Return random columns by signal, of which the default policy keeps about a third."""
    never = pa.array(np.zeros(rows, np.bool_))
    width, height = rng.integers(150, 1000, (2, rows), np.int32)
    return {
        "size": {
            "width": pa.array(width),
            "height": pa.array(height),
            "aspect": pa.array((np.maximum(width, height) / np.minimum(width, height)).astype(np.float32)),
            "file_bytes": pa.array(rng.integers(10_000, 500_000, rows)),
        },
        "caption": {
            "caption_words": pa.array(rng.integers(1, 40, rows, np.int32)),
            "caption_is_url": never,
            "caption_is_filename": never,
            "caption_is_boilerplate": pa.array(rng.random(rows) < 0.05),
        },
        "language": {"language": pa.array(rng.choice(np.array(["en", "en", "en", "de"], object), rows))},
        "clip": {"clip_score": pa.array(rng.normal(0.3, 0.03, rows).astype(np.float32))},
        "nsfw": {"nsfw_score": pa.array((rng.random(rows) ** 4).astype(np.float32))},
    }


def write_pairs(warehouse: Warehouse, ids: pa.Array, kind: str, ends: np.ndarray, distance: np.ndarray) -> PairsRef:
    """Write one table of pairs between places in `ids`."""
    one, other = (ids.take(pa.array(ends[:, at])) for at in (0, 1))
    swap = pa.compute.greater(one, other)
    left, right = pa.compute.if_else(swap, other, one), pa.compute.if_else(swap, one, other)
    path = f"pairs/{kind}@1/pairs.parquet"
    warehouse.write_table(path, pa.table([left, right, pa.array(distance, pa.float32())], schema=PAIRS))
    return PairsRef(kind, "1", (path,))


if __name__ == "__main__":
    main()
