"""Pipeline: curate, train, evaluate before and after, merge. What `make demo` runs."""

from dataclasses import dataclass

from prefect import flow

from flows.curate import curate
from flows.evaluate import Limit, evaluate
from flows.merge import merge
from flows.steps import Name
from flows.train import RecipeChanges, train
from storage.refs import EvaluationRef, MergeRef, RunRef, SnapshotRef
from tasks.curation.signals import SignalSettings


@dataclass(frozen=True)
class PipelineResult:
    """What the pipeline made, in order."""

    snapshot: SnapshotRef
    before: EvaluationRef
    run: RunRef
    after: EvaluationRef
    merged: MergeRef


@flow(name="pipeline")
def pipeline(
    dataset: Name,
    source: str | None = None,
    pool: Name | None = None,
    policy: str = "deployments/policies/default.yaml",
    policy_parameters: dict[str, float | str] | None = None,
    signals: SignalSettings = SignalSettings(),
    recipe: str = "deployments/recipes/qlora.yaml",
    changes: RecipeChanges = RecipeChanges(),
    limit: Limit | None = None,
    warehouse: str = "warehouse",
) -> PipelineResult:
    """From a source of image-caption pairs to a merged model, every step cached.

    Args:
        dataset: Name of the dataset to publish to and train on.
        source: Where new samples are; empty to decide again on what the pool holds.
        pool: Name of the pool to add them to; the dataset's name if empty.
        policy: Policy file.
        policy_parameters: Values for the policy's parameters, in place of those in the file.
        signals: What to measure and with which models.
        recipe: Recipe file.
        changes: Values in place of the recipe file's; empty fields keep those.
        limit: Evaluate on only so many prompts.
        warehouse: Folder or URL of the warehouse.
    """
    snapshot = curate(dataset, source, pool, policy, policy_parameters, signals, warehouse)
    trial = {"snapshot": snapshot.number, "recipe": recipe, "changes": changes, "warehouse": warehouse}
    before = evaluate(dataset, limit=limit, **trial)
    run = train(dataset, **trial)
    after = evaluate(dataset, run=run.run_id, limit=limit, **trial)
    merged = merge(run.run_id, warehouse)
    return PipelineResult(snapshot, before, run, after, merged)
