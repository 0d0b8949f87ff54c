"""The demo behind `make demo`: draw the sample, run the pipeline on it, say what came of it and where it lies.

Everything is offline: the sample is drawn here, and the two small models it needs ship with the package.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows.curate import curate
from flows.pipeline import PipelineResult, pipeline
from storage.catalog import connect
from storage.refs import SnapshotRef
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.funnel import Funnel
from tasks.curation.funnel_picture import draw_funnel
from tasks.curation.sample import write_extra, write_sample
from tasks.curation.sample_truth import TRUTH_FILE, FilterScore, SampleDecision, SampleTruth, score_filters
from tasks.curation.signals import SignalSettings

SAMPLE_CLIP = "local-dir:tasks/sample_models/clip"
SAMPLE_POLICY = "deployments/policies/sample.yaml"
CLIP_MIN = 0.28
TEST_PROMPTS = 100

QUERIES = {
    "what was rejected, for which reasons": (
        "SELECT reason, count(*) AS samples FROM (SELECT unnest(failed) AS reason FROM decisions) "
        "GROUP BY ALL ORDER BY samples DESC"
    ),
    "duplicates and the samples kept in their place": (
        "SELECT key, duplicate_rule, duplicate_distance, duplicate_of FROM decisions JOIN samples USING (sample_id) "
        "WHERE duplicate_of IS NOT NULL LIMIT 5"
    ),
    "an image's way into the adapter": (
        "SELECT run_id, key, source.member, adapter_uri FROM lineage ORDER BY key LIMIT 5"
    ),
}


def main() -> None:
    """Run the demo with the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.demo", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where the sample and the warehouse go")
    parser.add_argument("--samples", type=int, default=1000, help="samples to draw")
    parser.add_argument("--extra", action="store_true", help="add 50 more samples to the source first")
    parser.add_argument("--clip-min", type=float, default=CLIP_MIN, help="CLIP score a sample must reach")
    parser.add_argument("--curate-only", action="store_true", help="publish a snapshot, train nothing")
    arguments = parser.parse_args()

    started = time.monotonic()
    truth = prepare(arguments.folder / "source", samples=arguments.samples, extra=arguments.extra)
    warehouse = Warehouse(str(arguments.folder / "warehouse"))
    curation: dict[str, Any] = {
        "dataset": "sample",
        "source": truth.source,
        "policy": SAMPLE_POLICY,
        "policy_parameters": {"clip_min": arguments.clip_min},
        "signals": SignalSettings(clip_model=SAMPLE_CLIP),
        "warehouse": warehouse.root,
    }
    # nobody watches for heartbeats here, and every flow would wait a second for the end of its own
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        if arguments.curate_only:
            result, snapshot = None, curate(**curation)
        else:
            result = pipeline(**curation, recipe="deployments/recipes/sample.yaml", limit=TEST_PROMPTS)
            snapshot = result.snapshot
    tell_curation(snapshot, truth, warehouse=warehouse)
    if result:
        tell_training(result, warehouse=warehouse)
    tell_where(snapshot, warehouse=warehouse, folder=arguments.folder)
    say(f"\n{time.monotonic() - started:.0f} s in all. Run it again, and every step is Cached.")


def prepare(folder: Path, *, samples: int, extra: bool) -> SampleTruth:
    """Draw the sample if it is not there, and 50 more samples if asked."""
    if not (folder / TRUTH_FILE).exists():
        write_sample(folder, samples=samples)
    if extra:
        write_extra(folder, samples=50)
    return SampleTruth.read(folder)


def scores(truth: SampleTruth, snapshot: SnapshotRef, *, warehouse: Warehouse) -> list[FilterScore]:
    """Compare the snapshot's decisions, and what ingest put into quarantine, with what was planted."""
    with connect(warehouse) as catalog:
        decided = catalog.execute(
            "SELECT s.key, d.kept, d.failed, o.key, d.duplicate_rule FROM decisions d JOIN samples s USING (sample_id) "
            "LEFT JOIN samples o ON o.sample_id = d.duplicate_of WHERE d.dataset = ? AND d.snapshot = ?",
            [snapshot.dataset, snapshot.number],
        ).fetchall()
        unreadable = catalog.execute("SELECT DISTINCT key FROM quarantine").fetchall()
    decisions = [SampleDecision(key, kept, tuple(failed), *duplicate) for key, kept, failed, *duplicate in decided]
    decisions += [SampleDecision(key, kept=False, quarantined=True) for (key,) in unreadable]
    return score_filters(truth, decisions)


def tell_curation(snapshot: SnapshotRef, truth: SampleTruth, *, warehouse: Warehouse) -> None:
    """Print the funnel, and how the filters fared against the planted faults."""
    funnel = Funnel.from_dict(read_manifest(warehouse, snapshot).funnel)
    say(f"\n{snapshot}: kept {funnel.kept} of {funnel.samples} samples")
    table(
        ["reason", "fails", "only this", "left"],
        [[s.name, s.fails, s.fails_alone, s.remaining] for s in funnel.stages],
    )
    say("\nAgainst the planted faults")
    table(
        ["planted", "samples", "recall", "precision", "caught by"],
        [
            [s.oddity, s.planted, f"{s.recall:.2f}", share(s.precision), ", ".join(s.filters)]
            for s in scores(truth, snapshot, warehouse=warehouse)
        ],
    )


def tell_training(result: PipelineResult, *, warehouse: Warehouse) -> None:
    """Print what training, evaluation and merging came to."""
    before, after = (warehouse.read_table(e.table).to_pylist()[0] for e in (result.before, result.after))
    run = warehouse.read_table(result.run.table).to_pylist()[0]
    merged = warehouse.read_table(result.merged.table).to_pylist()[0]
    say(f"\nRun {run['run_id']}: {run['steps']} steps on {run['samples']} samples in {run['seconds']:.0f} s")
    say(f"  exact match on {before['samples']} held-out prompts: {interval(before)} before, {interval(after)} after")
    say(
        f"  merged model against adapter on base: KL {merged['kl_per_token']:.1e} nats a token, "
        f"same top token on {merged['agreement']:.1%} of {merged['tokens']}"
    )
    say(f"  adapter       {warehouse.uri(result.run.adapter)}")
    say(f"  merged model  {warehouse.uri(result.merged.model)}")


def tell_where(snapshot: SnapshotRef, *, warehouse: Warehouse, folder: Path) -> None:
    """Draw the funnel and print where to look and what to ask next."""
    draw_funnel(Funnel.from_dict(read_manifest(warehouse, snapshot).funnel), folder / "funnel.png")
    say(f"\nFunnel picture: {folder / 'funnel.png'}")
    say(f"Report with pictures of what was kept and rejected: {warehouse.uri(snapshot.report)}")
    say(f"Any DuckDB client opens the catalog: duckdb -readonly {warehouse.uri('catalog.duckdb')}")
    for what, query in QUERIES.items():
        say(f"  -- {what}\n  {query};")


def interval(row: dict[str, Any]) -> str:
    """An exact match with its 95 % interval."""
    return f"{row['exact_match']:.2f} ({row['exact_match_low']:.2f}-{row['exact_match_high']:.2f})"


def share(value: float | None) -> str:
    """A share of 1 with two digits, or a dash for none."""
    return "-" if value is None else f"{value:.2f}"


def table(head: list[str], rows: list[list[Any]]) -> None:
    """Print rows in columns, text to the left and numbers to the right."""
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    left = [bool(rows) and isinstance(rows[0][i], str) and not rows[0][i][:1].isdigit() for i in range(len(head))]
    for row in cells:
        say(
            "  "
            + "  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in zip(row, widths, left, strict=True))
        )


def say(line: str) -> None:
    """Print a line of the demo's report."""
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
