"""Whether a training on several GPUs goes on by itself where memory runs out, with the losses of one that has enough.

    python -m benchmarks.gpu.out_of_memory          # two GPUs
    python -m benchmarks.gpu.out_of_memory --tiny   # the sample's model, anywhere: nothing runs out or is recorded

Both trainings take the same 512 samples a step: one in forward passes of 256, which do not fit, one in passes of 32.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.qlora_smoke import IMAGE_TOKENS
from benchmarks.gpu.scaling import NOISE, say
from benchmarks.gpu.scenes import publish_scenes
from benchmarks.gpu.shapes import gemma4_half, tiny, write_processor
from benchmarks.record import record
from storage.record import read_record
from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training.fit import train
from tasks.training.gpu import reserved_gpus
from tasks.training.process import run_child
from tasks.training.recipe import Recipe

LAYERS = 12
SAMPLES = 512
STEPS = 4
PASSES = {"too large": 2, "small": 16}
"""Forward passes of a step, shared by the GPUs."""


def main() -> None:
    """Train in both ways, compare the losses, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a model of the sample's size, on whatever device there is")
    arguments = parser.parse_args()
    samples = 32 if arguments.tiny else SAMPLES
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = write_processor(folder / "model", tiny() if arguments.tiny else gemma4_half(LAYERS))
        recipe = Recipe(
            base_model=str(model),
            max_image_tokens=None if arguments.tiny else IMAGE_TOKENS,
            quantization="none",
            checkpointed_share=0.0,
            compile=False,
            max_steps=STEPS,
            save_steps=1,
            gpus=arguments.gpus,
            lora_dropout=0.0,  # what is dropped depends on how a batch is cut
        )
        with reserved_gpus(print) as gpus, tempfile.TemporaryDirectory() as own:
            config = {"recipe": recipe.model_dump(), "write": True}
            run_child("benchmarks.gpu.scaling", config, folder=Path(own), on_log=say, gpus=gpus)
        warehouse = Warehouse(str(folder / "warehouse"))
        snapshot = publish_scenes(warehouse, samples=samples, size=(480, 480))
        rows = {}
        for name, passes in PASSES.items():
            cut = {"batch_size": samples // passes, "accumulation": passes}
            rows[name] = measure(recipe.model_copy(update=cut), snapshot, warehouse)
            say(f"{name}: {rows[name]}")
    pairs = zip(rows["too large"]["losses"], rows["small"]["losses"], strict=True)
    difference = max(abs(one - other) / other for one, other in pairs)
    print(f"losses differ by {difference:.3%} at most")
    if arguments.tiny:
        return
    events = rows["too large"]["ran_out"]
    record(
        "gpu_out_of_memory",
        {"times_out_of_memory": len(events), "largest_loss_difference": difference},
        device=rows["small"]["device"],
        gpus=arguments.gpus,
        trainings=rows,
    )
    if not events or difference > NOISE:
        raise SystemExit(f"memory ran out {len(events)} times; losses differ by {difference:.2%}")


def measure(recipe: Recipe, snapshot: SnapshotRef, warehouse: Warehouse) -> dict[str, Any]:
    """Train as a run does; return its losses, its seconds with all that was started again, and when memory ran out."""
    started = time.monotonic()
    run = train(snapshot, recipe, warehouse=warehouse, on_log=say).ref
    seconds = time.monotonic() - started
    metrics = warehouse.read_table(f"{run.folder}/metrics.parquet")
    found = read_record(warehouse, f"{run.folder}/record.json")
    assert found is not None
    result = found.result
    return {
        "batch_size": recipe.batch_size,
        "ran_out": result["out_of_memory"],
        "micro_batch": metrics["micro_batch"].to_pylist(),
        "losses": metrics["loss"].to_pylist(),
        "peak_gib": result["peak_memory_bytes"] / 2**30,
        "seconds": seconds,
        "device": f"{recipe.gpus} x {result['device']}",
    }


if __name__ == "__main__":
    main()
