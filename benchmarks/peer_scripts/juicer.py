"""The chain in Data-Juicer: its own operators, executor and export, with its cache of results as it is by default.

Run by the Python of the peers' own environment: `python juicer.py SETTINGS RESULT`, both JSON files.
"""

import json
import os
import sys
import time
from pathlib import Path


def main(settings: dict, result: Path) -> None:
    """Run the chain and write the keys it keeps and the seconds inside its executor."""
    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor

    folder = Path(settings["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    limits = settings["thresholds"]
    dataset = folder / "dataset.jsonl"
    with dataset.open("w") as lines:
        for source in map(Path, settings["sources"]):
            for row in map(json.loads, source.read_text().splitlines()):
                image = str(source.parent / row["image_path"])
                lines.write(json.dumps({"key": row["key"], "text": row["caption"], "images": [image]}) + "\n")
    side, aspect = limits["side_min"], limits["aspect_max"]
    config = {
        "project_name": "peers",
        "dataset_path": str(dataset),
        "export_path": str(folder / "kept.jsonl"),
        "np": len(os.sched_getaffinity(0)),
        "process": [
            {"words_num_filter": {"min_num": limits["words_min"]}},
            {"special_characters_filter": {"max_ratio": limits["special_max"]}},
            {"image_shape_filter": {"min_width": side, "min_height": side}},
            {"image_aspect_ratio_filter": {"min_ratio": 1 / aspect, "max_ratio": aspect}},
            {"image_deduplicator": {"method": "phash"}},
        ],
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # YAML holds JSON
    began = time.perf_counter()
    DefaultExecutor(init_configs(["--config", str(folder / "config.yaml")])).run()
    seconds = time.perf_counter() - began
    kept = sorted(json.loads(line)["key"] for line in (folder / "kept.jsonl").read_text().splitlines())
    result.write_text(json.dumps({"seconds": seconds, "kept": kept}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
