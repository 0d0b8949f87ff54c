"""The chain in Tamis: ingest, score, pair, decide, publish, by the plain functions that the flow calls.

`python -m benchmarks.peer_scripts.tamis SETTINGS RESULT`, both JSON files. The warehouse stays where it is for a next
run with another threshold or more samples. No signal here needs an image's own pixels, so JPEGs are decoded at reduced
size for their perceptual hash, as `phash_decode` offers.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas  # noqa: F401 - pyarrow imports it at its first conversion; no tool's imports are in its seconds

from storage.pool import read_pool
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.ingest import ingest
from tasks.curation.pairs.perceptual import find_perceptual_pairs
from tasks.curation.policy import Policy
from tasks.curation.publish import publish
from tasks.curation.score import score_shard
from tasks.curation.signals import SignalSettings, build_signals
from tasks.curation.signals.thumbnail import thumbnail

thumbnail(np.zeros((64, 64, 3), np.uint8), 32)  # numba imports most of itself at its first call


def main(settings: dict[str, object], result: Path) -> None:
    """Run the chain and write the keys it keeps and the seconds of each step."""
    warehouse = Warehouse(str(settings["warehouse"]))
    policy = Policy.model_validate(
        {
            "name": "peers",
            "parameters": settings["thresholds"],
            "conditions": {
                "words": "caption_words >= $words_min",
                "special": "special_ratio <= $special_max",
                "side": "least(width, height) >= $side_min",
                "aspect": "aspect <= $aspect_max",
            },
            "duplicates": {"same": ["perceptual"]},
            "prefer": ["key asc"],
        }
    )
    seconds = {}
    began = last = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal last
        seconds[name], last = time.perf_counter() - last, time.perf_counter()

    for source in settings["sources"]:  # type: ignore[attr-defined]
        ingest(source, pool="peers", warehouse=warehouse)
    pool = read_pool(warehouse, "peers")
    lap("ingest")
    signals = build_signals(SignalSettings(measure=("size", "caption", "perceptual"), phash_decode="scaled"))
    for shard in pool.shards:
        score_shard(shard, signals, warehouse=warehouse)
    lap("score")
    refs = [signal.ref for signal in signals]
    pairs = [find_perceptual_pairs(pool, refs[2], max_distance=4, warehouse=warehouse).ref]
    lap("pairs")
    decisions = decide(pool, policy, refs, pairs, warehouse=warehouse).ref
    lap("decide")
    snapshot = publish("peers", pool, decisions, policy, refs, pairs, warehouse=warehouse).ref
    lap("publish")
    total = time.perf_counter() - began
    curated = [warehouse.read_table(entry.path, ["key"]) for entry in read_manifest(warehouse, snapshot).curated]
    kept = sorted(key for table in curated for key in table["key"].to_pylist())
    result.write_text(json.dumps({"seconds": total, "steps": seconds, "kept": kept}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
