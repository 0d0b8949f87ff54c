"""The preflight as a step: a table of findings in the warehouse, and an error that names every one that failed.

A preflight is named by all that its findings depend on. One that passed is not repeated; one that failed is kept under
the time it failed at, and tried again.
"""

import logging
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.record import Record, write_record
from storage.refs import Outcome, PreflightRef, RunRef, SnapshotRef
from storage.schema import PREFLIGHTS, column
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.training.base_model import BaseModel, find_base_model
from tasks.training.documents import write_rows
from tasks.training.gpu import reserved_gpus, visible_gpus
from tasks.training.preflight.contamination import check_contamination
from tasks.training.preflight.finding import Finding, failures
from tasks.training.process import run_child
from tasks.training.recipe import Recipe
from tasks.training.run import read_run

log = logging.getLogger(__name__)

VERSION = 1

MODULES = pa.schema(
    [
        column("part", pa.string(), "language, projector, vision, audio, head or other"),
        column("module", pa.string(), "last part of the layers' names; the rest of the part's weights together"),
        column("kind", pa.string(), "class that holds the weights, inside of LoRA and clipping"),
        column("dtype", pa.string(), "of the weights, or 4-bit"),
        column("four_bit", pa.bool_(), "held in 4 bits by bitsandbytes"),
        column("layers", pa.int64(), "layers, or modules with weights"),
        column("weights", pa.int64(), "their own weights"),
        column("bytes", pa.int64(), "memory of these, without the scales of 4-bit blocks"),
        column("adapted", pa.int64(), "layers with LoRA"),
        column("adapter_weights", pa.int64(), "weights of LoRA"),
        column("trained_weights", pa.int64(), "of their own weights, those that are trained"),
        column("clipping", pa.string(), "kept or bypassed around LoRA; empty where nothing is clipped"),
    ]
)

SPANS = pa.schema(
    [
        column("sample_id", pa.string(), "the sample"),
        column("text", pa.string(), "a stretch of it as the model sees it; image tokens are only counted"),
        column("supervised", pa.bool_(), "the loss covers it"),
    ]
)

# What no finding depends on: the base model counts by its content, not by what it is called.
_NOT_CHECKED = {
    *("base_model", "epochs", "max_steps", "warmup", "scheduler", "weight_decay", "early_stop_patience"),
    *("save_steps", "max_new_tokens", "answer_batch_size"),
}
_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes")


class PreflightFailed(ValueError):  # noqa: N818 - says what happened
    """A training must not start; the message has every failed check with what was measured and the remedy.

    `ref` is the preflight, whose table is there.
    """

    def __init__(self, ref: PreflightRef, failed: list[Finding]) -> None:
        lines = "\n".join(f"- {finding}" for finding in failed)
        super().__init__(f"preflight {ref.preflight_id}: failed checks: {len(failed)}\n{lines}")
        self.ref = ref


def preflight(
    snapshot: SnapshotRef,
    recipe: Recipe,
    *,
    warehouse: Warehouse,
    parent_run: RunRef | None = None,
    on_log: Callable[[str], None] | None = None,
) -> Outcome[PreflightRef]:
    """Check a training on the snapshot's train split before it starts; the model is looked at in a child process.

    Each line of the child's log goes to `on_log`. Returns the cached preflight if one passed and all it depends on is
    unchanged. Raises `PreflightFailed` after the table is written; `RecipeError`, `MissingBaseModel` or
    `WarehouseError` if there is nothing to check, and `ChildFailed` if the child ended without findings.
    """
    on_log = on_log or log.info
    base = find_base_model(recipe.base_model)
    if parent_run:
        read_run(parent_run, warehouse).check_goes_on(recipe, base)
    device = describe_device()
    inputs = {
        "samples": read_manifest(warehouse, snapshot).samples_content,
        "base_model": base.fingerprint,
        "parent_run": parent_run.run_id if parent_run else None,
        "device": device,
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    config = recipe.model_dump(exclude=_NOT_CHECKED)
    identity = fingerprint({"step": "preflight", "version": VERSION, "recipe": config, **inputs})
    ref = PreflightRef(identity)
    if warehouse.exists(ref.table):
        return Outcome(ref, cached=True)
    with warehouse.workspace() as folder:
        result = _look(snapshot, recipe, base, parent_run, warehouse=warehouse, folder=folder, on_log=on_log)
    findings = [Finding(**finding) for finding in result["findings"]]
    findings += check_contamination(snapshot, warehouse)
    if failed := failures(findings):
        ref = PreflightRef(f"{identity}-failed-{datetime.now(UTC):%Y%m%dt%H%M%S%f}")
    record = Record("preflight", identity, recipe.model_dump(), inputs, _counts(findings))
    write_record(warehouse, ref.record, record)
    warehouse.write_table(ref.modules, pa.Table.from_pylist(result["modules"], schema=MODULES))
    warehouse.write_table(ref.spans, pa.Table.from_pylist(result["spans"], schema=SPANS))
    warehouse.write_table(ref.table, _table(ref, snapshot, base, device, findings, record.created_at))
    if failed:
        raise PreflightFailed(ref, failed)
    return Outcome(ref, cached=False)


def describe_device() -> str:
    """Return what a training would run on: the visible GPUs with their memory, or the CPU."""
    gpus = visible_gpus()
    if not gpus:
        return f"CPU with {os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') >> 30} GiB"
    query = ["nvidia-smi", f"--id={','.join(gpus)}", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ", ".join(gpus)
    return "; ".join(sorted(line.strip() for line in listed.splitlines() if line.strip()))


def _look(
    snapshot: SnapshotRef,
    recipe: Recipe,
    base: BaseModel,
    parent_run: RunRef | None,
    *,
    warehouse: Warehouse,
    folder: Path,
    on_log: Callable[[str], None],
) -> dict[str, Any]:
    """Run the checks in a child process, on the rows and with the configuration that a training would have."""
    examples = write_rows(snapshot, recipe, split="train", warehouse=warehouse, path=folder / "examples.arrow")
    on_log(f"checking a training on {examples.rows} examples of {snapshot}")
    with ExitStack() as stack:
        parent = stack.enter_context(warehouse.downloaded(parent_run.adapter)) if parent_run else None
        gpus = stack.enter_context(reserved_gpus(on_log))
        config = {
            "recipe": recipe.model_dump(),
            "model": str(base.folder),
            "examples": str(examples.path),
            "parent_adapter": str(parent) if parent else None,
        }
        return run_child("tasks.training.preflight.child", config, folder=folder, on_log=on_log, gpus=gpus)


def _counts(findings: list[Finding]) -> dict[str, int]:
    return {status: sum(f.status == status for f in findings) for status in ("ok", "noted", "failed")}


def _table(
    ref: PreflightRef, snapshot: SnapshotRef, base: BaseModel, device: str, findings: list[Finding], created_at: str
) -> pa.Table:
    rows = [
        {
            "preflight_id": ref.preflight_id,
            "dataset": snapshot.dataset,
            "snapshot": snapshot.number,
            "base_model": base.name,
            "device": device,
            **{name: getattr(finding, name) for name in Finding.__dataclass_fields__},
            "created_at": created_at,
        }
        for finding in findings
    ]
    return pa.Table.from_pylist(rows, schema=PREFLIGHTS)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None
