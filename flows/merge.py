"""Merge: fold a run's adapter into its base model, and measure what that changed."""

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows.steps import step, taken
from storage.catalog import write_catalog
from storage.refs import MergeRef, Outcome, RunRef
from storage.warehouse import Warehouse
from tasks.adapters import merge as merging


@flow(name="merge")
def merge(run: str, warehouse: str = "warehouse") -> MergeRef:
    """Merge a run's adapter into the base model it was trained on and compare the two models' outputs.

    Args:
        run: Run whose adapter to merge.
        warehouse: Folder or URL of the warehouse.
    """
    store = Warehouse(warehouse)
    merged: MergeRef = taken(fold(RunRef(run), warehouse=store))
    report(merged, warehouse=store)
    return merged


@step(task_run_name="merge {run.run_id}")
def fold(run: RunRef, *, warehouse: Warehouse) -> Outcome[MergeRef]:
    """Merge and compare in a child process, its log lines in this task's log."""
    outcome = merging.merge(run, warehouse=warehouse, on_log=get_run_logger().info)
    write_catalog(warehouse)
    return outcome


def report(merged: MergeRef, *, warehouse: Warehouse) -> None:
    """Publish the gap between adapter-on-base and the merged model as an artifact."""
    row = warehouse.read_table(merged.table).to_pylist()[0]
    create_markdown_artifact(
        key=f"merge-{merged.merge_id}",
        description=f"Merge of run {row['run_id']}",
        markdown="\n".join(
            [
                f"# Merge of run {row['run_id']}",
                f"{row['method']}; model in `{row['model_uri']}`",
                "",
                "| KL per token, nats | largest logit difference | same top token | tokens |",
                "|---|---|---|---|",
                f"| {row['kl_per_token']:.2e} | {row['max_logit_difference']:.2e} | {row['agreement']:.2%} "
                f"| {row['tokens']} |",
            ]
        ),
    )
