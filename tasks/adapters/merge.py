"""Merges a run's adapter into its base model and records how far the result is from what was trained.

The merged model is an ordinary transformers folder: safetensors, configuration, processor and chat template.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.refs import MergeRef, Outcome, RunRef
from storage.schema import MERGES
from storage.warehouse import Warehouse
from tasks.training.base_model import find_base_model
from tasks.training.dataset import Examples
from tasks.training.documents import write_rows
from tasks.training.gpu import reserved_gpus
from tasks.training.process import run_child
from tasks.training.recipe import RecipeError
from tasks.training.run import FinishedRun, read_run

log = logging.getLogger(__name__)

VERSION = 1
COMPARED_EXAMPLES = 32


def merge(run: RunRef, *, warehouse: Warehouse, on_log: Callable[[str], None] | None = None) -> Outcome[MergeRef]:
    """Fold the run's adapter into the base model it was trained on; a 4-bit base is dequantized first.

    The saved model is loaded again and its logits on completions of the snapshot's validation split are compared with
    those of the adapter on its base. Returns the cached merge if there is one. Raises `WarehouseError` for an unknown
    run, `MissingBaseModel`, `RecipeError` if the base model's files have changed, or `ChildFailed`.
    """
    on_log = on_log or log.info
    finished = read_run(run, warehouse)
    base_fingerprint = finished.base_model_fingerprint
    merged = MergeRef(
        fingerprint({"step": "merge", "version": VERSION, "run": run.run_id, "base_model": base_fingerprint})
    )
    if warehouse.exists(merged.table):
        return Outcome(merged, cached=True)
    base = find_base_model(finished.recipe.base_model)
    finished.check_base(base)
    with ExitStack() as stack:
        folder = stack.enter_context(warehouse.workspace())
        adapter = stack.enter_context(warehouse.downloaded(run.adapter))
        config = {
            "recipe": finished.recipe.model_dump(),
            "model": str(base.folder),
            "adapter": str(adapter),
            "examples": str(_held_out(finished, warehouse, folder / "examples.arrow").path),
            "limit": COMPARED_EXAMPLES,
        }
        gpus = stack.enter_context(reserved_gpus(on_log))
        result = run_child("tasks.adapters.child", config, folder=folder, on_log=on_log, gpus=gpus)
        warehouse.create_folder(merged.model, folder / "model")
    on_log(
        f"merged: KL {result['kl_per_token']:.2e} nats per token, largest logit difference "
        f"{result['max_logit_difference']:.2e}, same top token {result['agreement']:.2%} of {result['tokens']}"
    )
    row = {
        "merge_id": merged.merge_id,
        "run_id": run.run_id,
        "model_uri": warehouse.uri(merged.model),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **result,
    }
    warehouse.write_table(merged.table, pa.Table.from_pylist([row], schema=MERGES))
    return Outcome(merged, cached=False)


def _held_out(run: FinishedRun, warehouse: Warehouse, path: Path) -> Examples:
    """Examples the run was not trained on, if its snapshot has any."""
    for split in ("validation", "test"):
        try:
            return write_rows(run.snapshot, run.recipe, split=split, warehouse=warehouse, path=path)
        except RecipeError:  # no sample with both texts in this split
            continue
    return write_rows(run.snapshot, run.recipe, split="train", warehouse=warehouse, path=path)
