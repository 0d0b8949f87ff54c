"""Preflight: what the checks before a training found, as a table in the UI; one failed check stops the training."""

from itertools import groupby
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.steps import step
from storage.catalog import write_catalog
from storage.refs import Outcome, PreflightRef, RunRef, SnapshotRef
from storage.warehouse import Warehouse
from tasks.training.preflight import step as checking
from tasks.training.recipe import Recipe

SIGNS = {"failed": "✗ failed", "noted": "noted", "ok": "✓"}
"""How a status is shown, the worst first."""


@step(task_run_name="check training on {snapshot}")
def preflight(
    snapshot: SnapshotRef, recipe: Recipe, *, parent_run: str | None, warehouse: Warehouse
) -> Outcome[PreflightRef]:
    """Check a training in a child process; fails with every remedy, after what was found is published."""
    try:
        outcome = checking.preflight(
            snapshot,
            recipe,
            warehouse=warehouse,
            parent_run=RunRef(parent_run) if parent_run else None,
            on_log=get_run_logger().info,
        )
    except checking.PreflightFailed as failed:
        _report(failed.ref, snapshot, warehouse)
        raise
    _report(outcome.ref, snapshot, warehouse)
    return outcome


def _report(ref: PreflightRef, snapshot: SnapshotRef, warehouse: Warehouse) -> None:
    """Publish the findings as a table, worst first, and as Markdown what failed, what is learned, by which layers."""
    write_catalog(warehouse)
    found = warehouse.read_table(ref.table, ["status", "check", "subject", "measured", "wanted", "remedy"]).to_pylist()
    findings = sorted(found, key=lambda finding: list(SIGNS).index(finding["status"]))
    create_table_artifact(
        key=f"preflight-{ref.preflight_id}",
        table=[{**finding, "status": SIGNS[finding["status"]]} for finding in findings],
        description=f"Preflight of a training on {snapshot}",
    )
    spans, modules = (warehouse.read_table(path).to_pylist() for path in (ref.spans, ref.modules))
    create_markdown_artifact(
        key=f"model-{ref.preflight_id}",
        description=f"What is learned from {snapshot}, and by which layers",
        markdown="\n".join([*_remedies(findings), *_learned(spans), "", *_layers(modules)]),
    )


def _remedies(findings: list[dict[str, Any]]) -> list[str]:
    """What failed or deserves a look, and what to do about it."""
    lines = []
    for finding in findings:
        if finding["status"] != "ok":
            lines += [
                f"- **{SIGNS[finding['status']]}: {finding['check']}**, {finding['subject']}. "
                f"Measured: {_quoted(finding['measured'])}. Wanted: {finding['wanted']}. {finding['remedy']}"
            ]
    head = "# What to change" if any(finding["status"] == "failed" for finding in findings) else "# What to watch"
    return [head, *lines, ""] if lines else []


def _learned(spans: list[dict[str, Any]]) -> list[str]:
    """Some samples as the model sees them, cut where the loss begins and ends."""
    lines = ["# What is learned"]
    for sample, parts in groupby(spans, key=lambda span: span["sample_id"]):
        lines += ["", f"Sample {sample}", ""]
        lines += [f"- {'**in the loss:** ' if part['supervised'] else ''}{_quoted(part['text'])}" for part in parts]
    return lines


def _quoted(text: str) -> str:
    """Text as code on one line, so that no token of it is taken for Markdown or HTML."""
    return f"`{text.replace('`', 'ˋ').replace(chr(10), '↵')}`"


def _layers(modules: list[dict[str, Any]]) -> list[str]:
    """The model's layers by part and name."""
    lines = [
        "# Which layers",
        "| part | module | layers | held as | weights | with LoRA | LoRA's weights | trained in full | clipping |",
        "|---|---|--:|---|--:|--:|--:|--:|---|",
    ]
    for row in modules:
        held = " ".join(filter(None, [row["kind"], row["dtype"]]))
        lines.append(
            f"| {row['part']} | {row['module']} | {row['layers']:,} | {held} | {row['weights']:,} | {row['adapted']:,} "
            f"| {row['adapter_weights']:,} | {row['trained_weights']:,} | {row['clipping']} |"
        )
    return lines
