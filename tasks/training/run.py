"""Reads back what a finished run was, for the steps that build on it."""

import json
from dataclasses import dataclass

from storage.refs import RunRef, SnapshotRef
from storage.warehouse import Warehouse, WarehouseError
from tasks.training.base_model import BaseModel
from tasks.training.recipe import Recipe, RecipeError

# What an adapter's matrices are shaped and scaled by.
_LORA = (
    *("lora_parts", "lora_targets", "lora_rank", "lora_alpha", "use_rslora", "use_dora"),
    *("rank_pattern", "alpha_pattern"),
)


@dataclass(frozen=True)
class FinishedRun:
    """A run's recipe, the snapshot it was trained on, and which files its base model had."""

    ref: RunRef
    recipe: Recipe
    snapshot: SnapshotRef
    base_model_fingerprint: str

    def check_base(self, base: BaseModel) -> None:
        """Raise `RecipeError` unless `base` is the very model that the run's adapter was trained on."""
        if base.fingerprint != self.base_model_fingerprint:
            raise RecipeError(
                f"base_model: {base.name!r} has fingerprint {base.fingerprint}, but run {self.ref.run_id} was trained "
                f"on {self.recipe.base_model!r} with fingerprint {self.base_model_fingerprint}. Use that model."
            )

    def check_goes_on(self, recipe: Recipe, base: BaseModel) -> None:
        """Raise `RecipeError` unless a training with `recipe` on `base` can start from what this run trained."""
        self.check_base(base)
        if recipe.sharding == "zero3" and recipe.method == "full":
            raise RecipeError(
                f"sharding: zero3 can't start from weights that the parent run {self.ref.run_id} trained in full. "
                "Write sharding: fsdp, or merge the parent run and take the merged model as base_model."
            )
        for name in ("method", "full_parts", *(_LORA if recipe.method == "lora" else ())):
            has, wanted = getattr(self.recipe, name), getattr(recipe, name)
            if has != wanted:
                raise RecipeError(
                    f"{name}: is {wanted!r}, but the adapter of the parent run {self.ref.run_id} has {has!r}. "
                    "Write the parent's value, or merge the parent run and take the merged model as base_model."
                )


def read_run(run: RunRef, warehouse: Warehouse) -> FinishedRun:
    """Return a finished run. Raises `WarehouseError` naming the runs there are if it is not one of them."""
    try:
        [row] = warehouse.read_table(run.table, ["recipe", "dataset", "snapshot", "base_model_fingerprint"]).to_pylist()
    except FileNotFoundError:
        known = ", ".join(warehouse.names("runs")) or "none"
        raise WarehouseError(
            f"{warehouse.root}: no finished run {run.run_id!r} (there are: {known}). Train it first."
        ) from None
    recipe = Recipe.model_validate(json.loads(row["recipe"]))
    return FinishedRun(run, recipe, SnapshotRef(row["dataset"], row["snapshot"]), row["base_model_fingerprint"])
