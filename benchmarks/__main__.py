"""`make bench`: run the benchmarks that need no GPU, then make the tables of `benchmarks/README.md` from the results.

`python -m benchmarks scoring pairs` runs some; `python -m benchmarks --tables` only makes the tables.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.record import RESULTS

BENCHMARKS = {
    "scoring": "All signals that need no model, on 640x480 JPEG, against decoding alone and a plain loop.",
    "pairs": "All pairs of 64-bit hashes that differ in at most 4 bits, against DuckDB and faiss; and in at most 10.",
    "semantic": "Near embeddings of 200k × 512, a tenth planted, against plain SemDeDup; and memory at 1M × 512.",
    "decide": "Decide by the default policy on a million samples: at first, with another threshold, again.",
    "whatif": "What if: one threshold at twenty values by language, and two policies compared, on a million samples.",
    "data_path": "From shards to batches at 280 tokens an image, 640x480 JPEG, against a loop; padding; token counts.",
    "peers": "The same filters and survivors as Data-Juicer, a script of one's own, imagededup and CleanVision.",
    "demo": "`make demo` on two cores: from nothing, again, with another threshold, with 50 more samples.",
}
ON_REQUEST = {"peers"}
"""Run only when named: it installs gigabytes of other tools."""
GPU_BENCHMARKS = {
    "gpu_qlora": "QLoRA from preflight to merged model on one GPU, with six layers of the 31B's width.",
    "gpu_train": "Fine-tuning random Gemma 4 models from real shards on one GPU: TRL as documented, and ours.",
    "gpu_equal": "Loss and gradients of the fast path and of the plain one on one GPU, in float32 and in bfloat16.",
    "gpu_scaling_lora": "QLoRA of half the 31B's layers on one GPU and on two: whole model on each, and by FSDP2.",
    "gpu_scaling_full": "Training in full from files on one GPU and on two, by FSDP2 and ZeRO-3; memory of each GPU.",
    "gpu_out_of_memory": "Two GPUs run out of memory and go on by themselves, beside a training that has enough.",
    "gpu_semantic": "Semantic pairs on one GPU, beside those found without it.",
}

HEAD = """# Benchmarks

`make bench` measures and writes `results/<name>.json` (command, device, versions, date, figures); this page is made
from those files by `python -m benchmarks --tables` and never edited by hand. GPU measurements are scripts in `gpu/`.
"""


def main() -> None:
    """Run the benchmarks named on the command line, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(BENCHMARKS)}; all but peers if none is named")
    parser.add_argument("--tables", action="store_true", help="only make the tables")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    every = [name for name in BENCHMARKS if name not in ON_REQUEST]
    for name in [] if arguments.tables else arguments.names or every:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    (RESULTS.parent / "README.md").write_text(page())


def page() -> str:
    """Return the page of all results."""
    parts = [HEAD]
    for name, about in (BENCHMARKS | GPU_BENCHMARKS).items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(section(name, about, json.loads(path.read_text())))
    return "\n".join(parts)


def section(name: str, about: str, result: dict[str, Any]) -> str:
    """Return one result as a Markdown section: a table of its figures, one of each list of rows, one of the rest."""
    meta = {"details", "command", "device", "date", "commit", "python", "versions"}
    everything = {**{key: value for key, value in result.items() if key not in meta}, **result["details"]}
    tables = {key: rows for key, value in everything.items() if (rows := rows_of(key, value))}
    figures = [f"| {key} | {show(result[key])} |" for key in result if key not in meta | tables.keys()]
    details = [f"| {key} | {show(value)} |" for key, value in result["details"].items() if key not in tables]
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    return "\n".join(
        [
            f"## {name}",
            "",
            about,
            "",
            "| figure | value |",
            "|:--|--:|",
            *figures,
            "",
            *(line for table in tables.values() for line in [*many(table), ""]),
            *(["| detail | |", "|:--|:--|", *details, ""] if details else []),
            f"`{result['command']}` on {result['device']}, {result['date']}, commit {result['commit']}, "
            f"Python {result['python']}; {versions}.",
            "",
        ]
    )


def rows_of(name: str, value: Any) -> list[dict[str, Any]]:
    """Return a list of rows, or a row for each key of rows by key; nothing for any other value."""
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()):
        return [{name: key, **row} for key, row in value.items()]
    return value if isinstance(value, list) and all(isinstance(row, dict) for row in value) else []


def many(rows: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table with a line for each row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = [f"| {' | '.join(names)} |", f"|:--|{'--:|' * (len(names) - 1)}"]
    return head + [f"| {' | '.join(show(row.get(name)) for name in names)} |" for row in rows]


def show(value: Any) -> str:
    """Return a value as one table cell, numbers with four digits or all that stand before the point."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return "; ".join(f"{key}: {show(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(show, value))
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,.0f}"
    return str(value).replace("|", "\\|")


if __name__ == "__main__":
    main()
