"""The demo in a fresh folder, four times: from nothing, unchanged, with one threshold changed, with 50 samples more.

Each run is a process of its own, as `make demo` starts it, so its seconds include start-up. What was measured anew is
read from the warehouse, and which steps were not Cached from Prefect's log.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import record
from flows.demo import scores
from storage.catalog import connect
from storage.snapshot import find_snapshot
from storage.warehouse import Warehouse
from tasks.curation.sample_truth import FilterScore, SampleTruth


def main() -> None:
    """Run the demo four times, print a table and write the result."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        warehouse = Warehouse(str(folder / "warehouse"))
        first, _ = run(folder)
        tables = signal_tables(warehouse)
        cached, cached_not = run(folder)
        cached_tables = signal_tables(warehouse) - tables
        truth = SampleTruth.read(folder / "source")
        found = scores(truth, find_snapshot(warehouse, "sample"), warehouse=warehouse)
        threshold, _ = run(folder, "--clip-min", "0.3", "--curate-only")
        threshold_tables = signal_tables(warehouse) - tables
        new_shard, _ = run(folder, "--extra", "--curate-only")
        new_tables = signal_tables(warehouse) - tables
        catalog = connect(warehouse)
        accuracy = {
            bool(run_id): exact
            for run_id, exact in catalog.execute("SELECT run_id, exact_match FROM evaluations").fetchall()
        }
    figures = {
        "first_seconds": first,
        "cached_seconds": cached,
        "one_threshold_seconds": threshold,
        "new_shard_seconds": new_shard,
        "accuracy_before": accuracy[False],
        "accuracy_after": accuracy[True],
        **worst([score for score in found if score.deterministic], "deterministic"),
        **worst([score for score in found if not score.deterministic], "judged"),
    }
    details = {
        "signal_tables_measured": {
            "cached": len(cached_tables),
            "one_threshold": len(threshold_tables),
            "new_shard": len(new_tables),
            "first": len(tables),
        },
        "not_cached_in_the_cached_run": cached_not or "none",
    }
    for name, value in figures.items():
        print(f"{name:28}{value:8.2f}")
    print(details)
    record("demo", figures, **details)


def worst(found: Sequence[FilterScore], kind: str) -> dict[str, float]:
    """Return the lowest recall and the lowest precision of some kinds of planted faults."""
    precision = [score.precision for score in found if score.precision is not None]
    return {f"worst_{kind}_recall": min(score.recall for score in found), f"worst_{kind}_precision": min(precision)}


def run(folder: Path, *options: str) -> tuple[float, list[str]]:
    """Run the demo and return its wall time in seconds, and the task runs that did not end as Cached."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "flows.demo", "--folder", str(folder), *options],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seconds = time.monotonic() - started
    states = dict(re.findall(r"Task run '(.+)' - Finished in state (\w+)", done.stdout))
    if not states:
        raise RuntimeError(f"the demo's log names no task runs:\n{done.stdout[-2000:]}")
    return seconds, [name for name, state in states.items() if state != "Cached"]


def signal_tables(warehouse: Warehouse) -> set[str]:
    """Return the paths of all signal tables that are there."""
    return {
        f"{folder}/{name}"
        for folder in warehouse.names("signals")
        for name in warehouse.names(f"signals/{folder}")
        if name.endswith(".parquet")
    }


if __name__ == "__main__":
    main()
