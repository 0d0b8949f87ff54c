"""Trains an adapter on a snapshot: a child process does the work, the warehouse gets the result and its lineage.

A run is named by all that its adapter depends on; one that exists is not trained again, one that was killed goes on.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.fingerprint import canonical_json, fingerprint
from storage.record import Record, write_record
from storage.refs import Outcome, RunRef, SnapshotRef
from storage.schema import EXAMPLES, RUNS, column
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.training.base_model import BaseModel, find_base_model
from tasks.training.dataset import Examples
from tasks.training.divergence import recall
from tasks.training.documents import write_rows
from tasks.training.gpu import reserved_gpus
from tasks.training.process import RESULT, ChildFailed, ChildStopped, run_child
from tasks.training.recipe import Recipe
from tasks.training.run import read_run

log = logging.getLogger(__name__)

VERSION = 4
VALIDATION = "validation.arrow"

METRICS = pa.schema(
    [
        column("step", pa.int64(), "optimizer step, from 1"),
        column("epoch", pa.float64(), "passes over the training split"),
        column("loss", pa.float64(), "mean over the step's supervised tokens, nats"),
        column("token_accuracy", pa.float64(), "share of supervised tokens that were the most likely one, 0–1"),
        column("entropy", pa.float64(), "mean entropy of the predicted tokens, nats"),
        column("learning_rate", pa.float64(), "learning rate of the step"),
        column("grad_norm", pa.float64(), "L2 norm of the gradients before clipping"),
        column("samples", pa.int64(), "samples of the step"),
        column("tokens", pa.int64(), "tokens of the step, prompts and images included"),
        column("micro_batch", pa.int64(), "most samples in one forward pass of one process"),
        column("seconds", pa.float64(), "wall time of the step, s"),
        column("input_wait_seconds", pa.float64(), "time of the step spent waiting for its batches, s"),
        column("peak_memory_bytes", pa.int64(), "most memory of tensors until then; without GPU, of the process"),
    ]
)


# How often a training on several GPUs goes on by itself after one of its processes was killed.
RESTARTS = 3

# What a run's adapter does not depend on: the base model counts by its content, not by what it is called; GPUs share
# the samples of a step without changing them.
_NOT_TRAINED = {"base_model", "gpus", "sharding", "allow_high_learning_rate", "max_new_tokens", "answer_batch_size"}


class TrainingFailed(RuntimeError):  # noqa: N818 - says what happened
    """The training process ended without an adapter; the message holds its last lines."""


class TrainingDiverged(TrainingFailed, ValueError):  # noqa: N818 - says what happened
    """A loss was not finite, and would not be again; the message names the step and its samples."""


class TrainingStopped(TrainingFailed):
    """The training process was asked to stop; the message says from which step it goes on when it is run again."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: its last step, and rates since the last time. Memory as in `METRICS`; wait is a share, 0-1."""

    run_id: str
    step: int
    steps: int
    loss: float
    token_accuracy: float
    learning_rate: float
    tokens_per_second: float
    samples_per_second: float
    input_wait_share: float
    peak_memory_bytes: int
    seconds_left: float


def train(
    snapshot: SnapshotRef,
    recipe: Recipe,
    *,
    warehouse: Warehouse,
    parent_run: RunRef | None = None,
    on_log: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Outcome[RunRef]:
    """Train an adapter on the snapshot's train split, starting from `parent_run`'s adapter if given.

    Each line of the training's log goes to `on_log`, and every few seconds how far it is to `on_progress`. Returns the
    cached run if all it depends on is unchanged. A training that was killed or stopped goes on from its last
    checkpoint when it is called again. Raises `RecipeError`, `MissingBaseModel` or `TrainingFailed`: as
    `TrainingStopped` when SIGTERM ended the training process, and as `TrainingDiverged` when the loss was not finite,
    now or in an earlier call that this one would only repeat.
    """
    watch = _Watch(on_log or log.info, on_progress or (lambda _: None))
    plan = _Plan.make(snapshot, recipe, parent_run, warehouse)
    run = plan.run
    if warehouse.exists(run.table):
        return Outcome(run, cached=True)
    if parent_run:
        read_run(parent_run, warehouse).check_goes_on(recipe, plan.base)
    with _scratch(run, warehouse, watch.on_log) as scratch:
        if warehouse.exists(run.table):  # another process finished it while this one waited
            return Outcome(run, cached=True)
        examples = write_rows(snapshot, recipe, split="train", warehouse=warehouse, path=scratch / "examples.arrow")
        if recipe.early_stop_patience:
            path = scratch / VALIDATION
            write_rows(snapshot, recipe, split="validation", warehouse=warehouse, path=path)
        watch.on_log(
            f"run {run.run_id}: {examples.rows} examples of {snapshot}; {examples.left_out} without text left out"
        )
        result = _train_in_child(plan, examples, warehouse=warehouse, scratch=scratch, watch=watch)
        _publish(plan, examples, result, warehouse=warehouse, scratch=scratch)
        shutil.rmtree(scratch, ignore_errors=True)
    return Outcome(run, cached=False)


@dataclass(frozen=True)
class _Watch:
    """Who is told what goes on."""

    on_log: Callable[[str], None]
    on_progress: Callable[[Progress], None]


@dataclass(frozen=True)
class _Plan:
    """All that a run depends on, and the name that follows from it."""

    run: RunRef
    snapshot: SnapshotRef
    recipe: Recipe
    base: BaseModel
    parent_run: RunRef | None
    inputs: dict[str, Any]

    @classmethod
    def make(cls, snapshot: SnapshotRef, recipe: Recipe, parent_run: RunRef | None, warehouse: Warehouse) -> "_Plan":
        base = find_base_model(recipe.base_model)
        inputs = {
            "samples": read_manifest(warehouse, snapshot).samples_content,
            "base_model": base.fingerprint,  # its chat template included
            "parent_run": parent_run.run_id if parent_run else None,
        }
        run = RunRef(fingerprint({"step": "train", "version": VERSION, "recipe": _trained_with(recipe), **inputs}))
        return cls(run, snapshot, recipe, base, parent_run, inputs)


def _trained_with(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields that the adapter depends on."""
    config = recipe.model_dump(exclude=_NOT_TRAINED)
    if not recipe.early_stop_patience:  # stopping early, when a checkpoint is due decides which one is the best
        del config["save_steps"]
    if recipe.max_steps:
        del config["epochs"]
    if recipe.method == "full":
        config = {name: value for name, value in config.items() if not name.startswith("lora_")}
    if recipe.tokens_per_batch:  # batches of like length are put together for each process
        config["gpus"] = recipe.gpus
    if not recipe.is_four_bit(on_gpu=True):  # auto is what it says here, for which method and sharding count
        config["quantization"] = "none"
    for name in ("rank_pattern", "alpha_pattern"):
        if len(config[name]) > 1:  # the first pattern that matches a layer wins
            config[name] = list(config[name].items())
    return config


@contextmanager
def _scratch(run: RunRef, warehouse: Warehouse, on_log: Callable[[str], None]) -> Iterator[Path]:
    """Give the local folder of an unfinished run, to one process at a time; it stays, for the next attempt."""
    folder = _work_folder(warehouse) / run.run_id
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_log(f"another process is training run {run.run_id}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def _work_folder(warehouse: Warehouse) -> Path:
    """Checkpoints need a local disk and a place that the next attempt finds again."""
    if warehouse.is_local:
        return Path(warehouse.root, ".work")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "tamis" / fingerprint(warehouse.root)


def _train_in_child(
    plan: _Plan, examples: Examples, *, warehouse: Warehouse, scratch: Path, watch: _Watch
) -> dict[str, Any]:
    if (scratch / RESULT).exists():  # an earlier attempt was killed after training, before all was published
        result: dict[str, Any] = json.loads((scratch / RESULT).read_text())
        return result
    run_id = plan.run.run_id
    if diverged := recall(scratch):
        raise TrainingDiverged(
            f"run {run_id}: {diverged} It ended so before, and was not tried again: samples, recipe and versions are "
            f"the same. To train it anyway, delete {scratch}."
        )
    with ExitStack() as stack:
        parent = stack.enter_context(warehouse.downloaded(plan.parent_run.adapter)) if plan.parent_run else None
        gpus = stack.enter_context(reserved_gpus(watch.on_log, plan.recipe.gpus))
        config = {
            "recipe": plan.recipe.model_dump(),
            "model": str(plan.base.folder),
            "examples": str(examples.path),
            "validation": str(scratch / VALIDATION) if plan.recipe.early_stop_patience else None,
            "parent_adapter": str(parent) if parent else None,
        }
        try:
            return run_child(
                "tasks.training.child",
                config,
                folder=scratch,
                on_log=watch.on_log,
                on_report=lambda report: watch.on_progress(Progress(run_id=run_id, **report)),
                gpus=gpus,
                processes=plan.recipe.gpus,
                restarts=RESTARTS if plan.recipe.gpus > 1 else 0,
            )
        except ChildStopped as stopped:
            raise TrainingStopped(f"run {run_id}: {stopped}") from None
        except ChildFailed as error:
            if diverged := recall(scratch):
                raise TrainingDiverged(f"run {run_id}: {diverged}") from None
            raise TrainingFailed(f"run {run_id}: {error}") from None


def _publish(plan: _Plan, examples: Examples, result: dict[str, Any], *, warehouse: Warehouse, scratch: Path) -> None:
    """Write adapter, metrics and record, and last the row of the `runs` view."""
    run = plan.run
    warehouse.create_folder(run.adapter, scratch / "adapter")
    metrics_path = f"{run.folder}/metrics.parquet"
    warehouse.create_folder(run.event_files, scratch / "tensorboard")
    lines = (scratch / "metrics.jsonl").read_text().splitlines()
    warehouse.write_table(metrics_path, pa.Table.from_pylist([json.loads(line) for line in lines], schema=METRICS))
    warehouse.write_table(run.examples, _given(run, examples))
    counts = {"examples": examples.rows, "left_out": examples.left_out, "steps": result["steps"]}
    record = Record("train", run.run_id, plan.recipe.model_dump(), plan.inputs, counts, result)
    write_record(warehouse, f"{run.folder}/record.json", record)
    row = {
        "run_id": run.run_id,
        "recipe": canonical_json(plan.recipe),
        "dataset": plan.snapshot.dataset,
        "snapshot": plan.snapshot.number,
        "base_model": plan.base.name,
        "base_model_fingerprint": plan.base.fingerprint,
        "chat_template_fingerprint": result["chat_template_fingerprint"],
        "adapter_uri": warehouse.uri(run.adapter),
        "parent_run": plan.parent_run.run_id if plan.parent_run else None,
        "samples": examples.rows,
        "steps": result["steps"],
        "train_loss": result["train_loss"],
        "metrics_uri": warehouse.uri(metrics_path),
        "seconds": result["seconds"],
        "device": result["device"],
        "code_version": version("tamis"),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    warehouse.write_table(run.table, pa.Table.from_pylist([row], schema=RUNS))


def _given(run: RunRef, examples: Examples) -> pa.Table:
    """The samples or documents that the run was given."""
    with pa.memory_map(str(examples.path)) as file, pa.ipc.open_stream(file) as reader:
        ids = [batch["sample_id"] for batch in reader]
    given = pa.chunked_array(ids, pa.string())
    return pa.table([pa.array([run.run_id] * len(given)), given], schema=EXAMPLES)
