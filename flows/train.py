"""Train: fine-tune a base model on a snapshot with LoRA, as a recipe says."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from pydantic import ConfigDict, Field, create_model

from flows.preflight import preflight
from flows.progress import LiveProgress
from flows.steps import AtLeastOne, Name, step, taken
from storage.catalog import write_catalog
from storage.refs import Outcome, RunRef, SnapshotRef
from storage.snapshot import find_snapshot
from storage.warehouse import Warehouse
from tasks.training import fit as fitting
from tasks.training.recipe import Recipe, load_recipe

RecipeChanges = create_model(  # a form of all the recipe's fields, each optional
    "RecipeChanges",
    __config__=ConfigDict(frozen=True, extra="forbid"),
    **{
        name: (field.annotation | None, Field(None, description=field.description))
        for name, field in Recipe.model_fields.items()
    },
)


@flow(name="train")
def train(
    dataset: Name,
    snapshot: AtLeastOne | None = None,
    recipe: str = "deployments/recipes/qlora.yaml",
    changes: RecipeChanges = RecipeChanges(),  # noqa: B008 - frozen
    parent_run: str | None = None,
    warehouse: str = "warehouse",
) -> RunRef:
    """Fine-tune a base model on a dataset's snapshot and keep the adapter with its lineage; checked before it starts.

    Args:
        dataset: Dataset to train on.
        snapshot: Number of the snapshot; the latest if empty.
        recipe: Recipe file.
        changes: Values in place of the recipe file's; empty fields keep those.
        parent_run: Run whose adapter to start from.
        warehouse: Folder or URL of the warehouse.
    """
    store = Warehouse(warehouse)
    pinned = find_snapshot(store, dataset, snapshot)
    settings = load_recipe(recipe, changed(changes))
    # called directly, never submitted: only so does cancelling reach the training process
    preflight(pinned, settings, parent_run=parent_run, warehouse=store)
    run: RunRef = taken(fit(pinned, settings, parent_run=parent_run, warehouse=store))
    report(run, pinned, settings, warehouse=store)
    return run


@step(task_run_name="train on {snapshot}")
def fit(snapshot: SnapshotRef, recipe: Recipe, *, parent_run: str | None, warehouse: Warehouse) -> Outcome[RunRef]:
    """Train in a child process, its log lines in this task's log."""
    outcome = fitting.train(
        snapshot,
        recipe,
        warehouse=warehouse,
        parent_run=RunRef(parent_run) if parent_run else None,
        on_log=get_run_logger().info,
        on_progress=LiveProgress(snapshot),
    )
    write_catalog(warehouse)
    if not outcome.cached:
        emit_event(
            "tamis.run.finished",
            resource={"prefect.resource.id": f"tamis.run.{outcome.ref.run_id}"},
            payload={"run": outcome.ref.run_id, "dataset": snapshot.dataset, "snapshot": snapshot.number},
        )
    return outcome


def changed(changes: Any) -> dict[str, Any]:
    """Return the fields of a form that somebody filled in."""
    return {name: value for name, value in changes.model_dump().items() if value is not None}


def report(run: RunRef, snapshot: SnapshotRef, recipe: Recipe, *, warehouse: Warehouse) -> None:
    """Publish what was trained on what, as an artifact."""
    row = warehouse.read_table(run.table).to_pylist()[0]
    create_markdown_artifact(
        key=f"run-{run.run_id}",
        description=f"Training on {snapshot}",
        markdown="\n".join(
            [
                f"# Run {run.run_id}",
                "| | |",
                "|---|---|",
                f"| snapshot | {snapshot} |",
                f"| base model | {recipe.base_model} ({row['base_model_fingerprint']}) |",
                f"| samples, steps | {row['samples']}, {row['steps']} |",
                f"| last loss | {row['train_loss']:.4f} |",
                f"| time | {row['seconds']:.0f} s on {row['device']} |",
                f"| adapter | `{row['adapter_uri']}` |",
                "",
                f"Which images it saw: `from lineage where run_id = '{run.run_id}'`",
            ]
        ),
    )
