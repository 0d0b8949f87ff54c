"""What fits: how a training can be laid out on a GPU of a given size, from the model's configuration alone."""

import tempfile
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from pydantic import Field

from flows.steps import artifact_key
from flows.train import RecipeChanges, changed
from tasks.training.base_model import find_config
from tasks.training.process import run_child
from tasks.training.recipe import load_recipe

GIB = 2**30


@flow(name="what-fits")
def what_fits(
    recipe: str = "deployments/recipes/qlora.yaml",
    changes: RecipeChanges = RecipeChanges(),
    gpu_gib: Annotated[float, Field(gt=0)] = 80,
    sample_tokens: Annotated[int, Field(ge=1)] = 384,
    images: Annotated[int, Field(ge=0)] = 1,
    supervised_tokens: Annotated[int, Field(ge=1)] = 64,
) -> list[dict[str, Any]]:
    """Propose batch size, accumulation, recomputed layers and image tokens that fit a GPU, the fastest that does.

    Args:
        recipe: Recipe file.
        changes: Values in place of the recipe file's; empty fields keep those.
        gpu_gib: Memory of the GPU, GiB.
        sample_tokens: Tokens of a long sample, images included.
        images: Images of a sample.
        supervised_tokens: Tokens of its answer.
    """
    settings = load_recipe(recipe, changed(changes))
    config = {
        "config": str(find_config(settings.base_model)),
        "recipe": settings.model_dump(),
        "device_bytes": int(gpu_gib * GIB),
        "sample_tokens": sample_tokens,
        "images": images,
        "supervised_tokens": supervised_tokens,
    }
    with tempfile.TemporaryDirectory() as folder:
        found = run_child("tasks.training.memory.fits", config, folder=Path(folder), on_log=get_run_logger().info)
    rows = [table_row(proposal) for proposal in found["proposals"]]
    create_table_artifact(
        key=artifact_key("what-fits", f"{gpu_gib:g}-gib"),
        table=rows or [{"nothing fits": found["least"]}],
        description=f"Layouts of {recipe} on {settings.base_model} that fit {gpu_gib:g} GiB, by tokens of an image",
    )
    return rows


def table_row(proposal: dict[str, Any]) -> dict[str, Any]:
    """One proposal as people read it: the recipe's fields first, then memory in GiB."""
    estimate = proposal["estimate"]
    parts = {name: round(value / GIB, 2) for name, value in estimate.items() if isinstance(value, int)}
    return {
        "max_image_tokens": proposal["max_image_tokens"],
        "batch_size": proposal["batch_size"],
        "accumulation": proposal["accumulation"],
        "checkpointed_share": round(proposal["checkpointed_share"], 3),
        "tokens_per_batch": proposal["tokens_per_batch"],
        "relative_time": round(proposal["relative_time"], 2),
        "peak_gib": round(sum(parts.values()), 1),
        "most_at": estimate["moment"],
        **{f"{name}_gib": value for name, value in parts.items()},
    }
