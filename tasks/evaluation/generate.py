"""Evaluates a model on a split of a snapshot: a child process generates the answers, they are scored here.

Without a run the base model alone answers, so two evaluations with one recipe are the before and after of a training.
"""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from storage.fingerprint import fingerprint
from storage.refs import EvaluationRef, Outcome, RunRef, SnapshotRef
from storage.schema import EVALUATIONS, SAMPLE_ID, column
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.evaluation.metrics import is_exact_match, wilson_interval
from tasks.training.base_model import BaseModel, find_base_model
from tasks.training.dataset import write_examples
from tasks.training.gpu import reserved_gpus
from tasks.training.process import run_child
from tasks.training.recipe import Recipe
from tasks.training.run import read_run

log = logging.getLogger(__name__)

VERSION = 1

ANSWERS = pa.schema(
    [
        SAMPLE_ID,
        column("prompt", pa.string(), "text the model was given, its image as a placeholder"),
        column("expected", pa.string(), "the recipe's completion"),
        column("answer", pa.string(), "what the model generated, greedily"),
        column("correct", pa.bool_(), "whether the two are equal after normalisation"),
        column("stopped", pa.bool_(), "whether the model ended the answer itself, before the longest length"),
    ]
)

# What answers depend on, beside the weights.
_ANSWERED = {
    "prompt",
    "completion",
    "max_image_tokens",
    "method",  # quantization: auto depends on it
    "quantization",
    "precision",
    "max_new_tokens",
    "answer_batch_size",
}


def evaluate(
    snapshot: SnapshotRef,
    recipe: Recipe,
    *,
    run: RunRef | None,
    warehouse: Warehouse,
    split: str = "test",
    limit: int | None = None,
    on_log: Callable[[str], None] | None = None,
) -> Outcome[EvaluationRef]:
    """Answer the split's prompts (the first `limit` by sample_id) with the recipe's base model and `run`'s adapter.

    Each line of the child's log goes to `on_log`. Returns the cached evaluation if all it depends on is unchanged.
    Raises `RecipeError` (also if the run was trained on another base model), `MissingBaseModel` or `ChildFailed`, and
    `ValueError` for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: is {limit}. Write how many prompts to answer, 1 or more, or leave it empty for all.")
    on_log = on_log or log.info
    base = find_base_model(recipe.base_model)
    identity = {
        "step": "evaluate",
        "version": VERSION,
        "recipe": recipe.model_dump(include=_ANSWERED) | _held_in(recipe),
        "base_model": base.fingerprint,
        "run": run.run_id if run else None,
        "samples": read_manifest(warehouse, snapshot).samples_content,
        "split": split,
        "limit": limit,
    }
    evaluation = EvaluationRef(fingerprint(identity))
    if warehouse.exists(evaluation.table):
        return Outcome(evaluation, cached=True)
    if run:
        read_run(run, warehouse).check_base(base)
    started = time.monotonic()
    answers = _answer(snapshot, recipe, base, run=run, split=split, limit=limit, warehouse=warehouse, on_log=on_log)
    seconds = time.monotonic() - started
    warehouse.write_table(evaluation.answers, answers)
    score = wilson_interval(sum(answers["correct"].to_pylist()), answers.num_rows)
    on_log(f"{snapshot} {split}: exact match {score.value:.3f} ({score.low:.3f} to {score.high:.3f}) of {score.total}")
    row = {
        "evaluation_id": evaluation.evaluation_id,
        "run_id": run.run_id if run else None,
        "base_model": base.name,
        "dataset": snapshot.dataset,
        "snapshot": snapshot.number,
        "split": split,
        "samples": score.total,
        "exact_match": score.value,
        "exact_match_low": score.low,
        "exact_match_high": score.high,
        "answers_uri": warehouse.uri(evaluation.answers),
        "seconds": seconds,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    warehouse.write_table(evaluation.table, pa.Table.from_pylist([row], schema=EVALUATIONS))
    return Outcome(evaluation, cached=False)


def _held_in(recipe: Recipe) -> dict[str, str]:
    """The quantization, where auto can only be none: sharding says so too."""
    return {} if recipe.is_four_bit(on_gpu=True) else {"quantization": "none"}


def _answer(
    snapshot: SnapshotRef,
    recipe: Recipe,
    base: BaseModel,
    *,
    run: RunRef | None,
    split: str,
    limit: int | None,
    warehouse: Warehouse,
    on_log: Callable[[str], None],
) -> pa.Table:
    """Let a child process answer the prompts; return `ANSWERS`, ordered by sample_id."""
    with ExitStack() as stack:
        folder = stack.enter_context(warehouse.workspace())
        adapter = stack.enter_context(warehouse.downloaded(run.adapter)) if run else None
        examples = write_examples(snapshot, recipe, split=split, warehouse=warehouse, path=folder / "examples.arrow")
        config = {
            "recipe": recipe.model_dump(),
            "model": str(base.folder),
            "adapter": str(adapter) if adapter else None,
            "examples": str(examples.path),
            "limit": limit,
        }
        gpus = stack.enter_context(reserved_gpus(on_log))
        run_child("tasks.evaluation.child", config, folder=folder, on_log=on_log, gpus=gpus)
        answers = pq.read_table(folder / "answers.parquet")
    pairs = zip(answers["answer"].to_pylist(), answers["expected"].to_pylist(), strict=True)
    correct = pa.array([is_exact_match(answer, expected) for answer, expected in pairs], pa.bool_())
    return answers.append_column("correct", correct).select(ANSWERS.names).cast(ANSWERS)
