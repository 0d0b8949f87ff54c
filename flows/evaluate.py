"""Evaluate: let a model, with or without a run's adapter, answer the held-out prompts of a snapshot."""

from typing import Annotated, Literal

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.runtime import task_run
from pydantic import Field

from flows.steps import Name, step, taken
from flows.train import RecipeChanges, changed
from storage.catalog import write_catalog
from storage.refs import EvaluationRef, Outcome, RunRef, SnapshotRef
from storage.snapshot import find_snapshot
from storage.warehouse import Warehouse
from tasks.evaluation import generate as generating
from tasks.training.recipe import Recipe, load_recipe

Limit = Annotated[int, Field(ge=1)]
"""How many prompts to answer."""


@flow(name="evaluate")
def evaluate(
    dataset: Name,
    run: str | None = None,
    snapshot: int | None = None,
    recipe: str = "deployments/recipes/qlora.yaml",
    changes: RecipeChanges = RecipeChanges(),
    split: Literal["train", "validation", "test"] = "test",
    limit: Limit | None = None,
    warehouse: str = "warehouse",
) -> EvaluationRef:
    """Measure exact match on held-out samples, with a 95 % interval.

    Args:
        dataset: Dataset to take prompts from.
        run: Run whose adapter to put on; empty for the base model alone.
        snapshot: Number of the snapshot; the latest if empty.
        recipe: Recipe file: base model, prompt and expected answer.
        changes: Values in place of the recipe file's; empty fields keep those.
        split: Split to take prompts from.
        limit: Answer only so many prompts.
        warehouse: Folder or URL of the warehouse.
    """
    store = Warehouse(warehouse)
    pinned = find_snapshot(store, dataset, snapshot)
    settings = load_recipe(recipe, changed(changes))
    evaluation: EvaluationRef = taken(
        answer(pinned, settings, run=RunRef(run) if run else None, split=split, limit=limit, warehouse=store)
    )
    report(evaluation, warehouse=store)
    return evaluation


def _task_run_name() -> str:
    given = task_run.parameters
    run: RunRef | None = given["run"]
    return f"evaluate {run.run_id if run else 'base model'} on {given['snapshot']} {given['split']}"


@step(task_run_name=_task_run_name)
def answer(
    snapshot: SnapshotRef, recipe: Recipe, *, run: RunRef | None, split: str, limit: int | None, warehouse: Warehouse
) -> Outcome[EvaluationRef]:
    """Generate and compare answers in a child process, its log lines in this task's log."""
    outcome = generating.evaluate(
        snapshot, recipe, run=run, split=split, limit=limit, warehouse=warehouse, on_log=get_run_logger().info
    )
    write_catalog(warehouse)
    return outcome


def report(evaluation: EvaluationRef, *, warehouse: Warehouse) -> None:
    """Publish the score and some answers as an artifact."""
    row = warehouse.read_table(evaluation.table).to_pylist()[0]
    answers = warehouse.read_table(evaluation.answers).slice(0, 10).to_pylist()
    model = f"run {row['run_id']}" if row["run_id"] else "base model"
    lines = [
        f"# Exact match {row['exact_match']:.3f}",
        f"95 % interval {row['exact_match_low']:.3f} to {row['exact_match_high']:.3f}, {row['samples']} prompts of "
        f"{row['dataset']}@{row['snapshot']} {row['split']}, {model}.",
        "",
        "| expected | answered | |",
        "|---|---|---|",
        *(f"| {a['expected']} | {a['answer']} | {'✓' if a['correct'] else '✗'} |" for a in answers),
    ]
    create_markdown_artifact(
        key=f"evaluation-{evaluation.evaluation_id}", markdown="\n".join(lines), description="Exact match"
    )
