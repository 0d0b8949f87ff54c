"""Writes a benchmark's figures, with what is needed to repeat them, to `benchmarks/results/<name>.json`."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = [
    "numpy",
    "pyarrow",
    "duckdb",
    "pillow",
    "simplejpeg",
    "opencv-python-headless",
    "imagehash",
    "fasttext-langdetect",
    "faiss-cpu",
    "open_clip_torch",
    "onnxruntime",
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "prefect",
]


def record(name: str, figures: dict[str, float | int | str], **details: Any) -> Path:
    """Write `figures` and `details` as the result `name`, replacing an earlier one; returns the file.

    Adds the command, device, date, commit and package versions by itself.
    """
    result = {
        **figures,
        "details": details,
        "command": shlex.join(["python", *[Path(a).name if Path(a).is_absolute() else a for a in sys.orig_argv[1:]]]),
        "device": details.pop("device", None) or _processor(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _processor() -> str:
    cores = len(os.sched_getaffinity(0))
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{cores} cores of {names[0] if names else platform.processor()}"


def _commit() -> str | None:
    root = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
