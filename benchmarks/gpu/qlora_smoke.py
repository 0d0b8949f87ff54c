"""QLoRA from preflight to merged model on one GPU, with a random Gemma 4 of the 31B's width and a few of its layers.

    python -m benchmarks.gpu.qlora_smoke --layers 6 --steps 20

`--tiny` takes the model that ships with the sample instead and runs anywhere; its speed means nothing.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoModelForMultimodalLM, GenerationConfig

from benchmarks.gpu.scenes import publish_scenes
from benchmarks.gpu.shapes import SAMPLE, gemma4_31b, write_processor
from benchmarks.record import record
from storage.refs import RunRef
from storage.warehouse import Warehouse
from tasks.adapters.merge import merge
from tasks.evaluation.generate import evaluate
from tasks.training.fit import train
from tasks.training.preflight.step import PreflightFailed, preflight
from tasks.training.recipe import Recipe

WARM_UP_STEPS = 3
IMAGE_TOKENS = 280


def write_model(folder: Path, layers: int) -> Path:
    """Write a random model of the 31B's width in bfloat16, with the sample's processor set to its image size."""
    write_processor(folder, gemma4_31b(layers))
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForMultimodalLM.from_config(gemma4_31b(layers), dtype=torch.bfloat16)
    model.generation_config = GenerationConfig.from_pretrained(SAMPLE)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def figures_of(run: RunRef, warehouse: Warehouse) -> dict[str, float | int | str]:
    """What a run did after its first steps: throughput, memory, and what was 4-bit."""
    result = json.loads(warehouse.read_bytes(f"{run.folder}/record.json"))["result"]
    steps = warehouse.read_table(f"{run.folder}/metrics.parquet").slice(WARM_UP_STEPS).to_pylist()
    return {
        "train_tokens_per_second": sum(s["tokens"] for s in steps) / sum(s["seconds"] for s in steps),
        "tokens_per_step": steps[-1]["tokens"],
        "peak_memory_gib": (result["peak_memory_bytes"] or 0) / 2**30,
        "four_bit_layers": result["four_bit_layers"],
        "lora_layers": result["lora_layers"],
        "lora_weights_millions": result["trained_weights"] / 1e6,
        "first_loss": warehouse.read_table(f"{run.folder}/metrics.parquet")["loss"][0].as_py(),
        "last_loss": result["train_loss"],
        "best_validation_loss": result["validation_loss"],
    }


def main() -> None:
    """Check, train, evaluate before and after, and merge; print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers, a multiple of 6; the 31B has 60")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="the sample's model, on whatever device there is")
    args = parser.parse_args()

    seconds: dict[str, float] = {}
    figures: dict[str, float | int | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        warehouse = Warehouse(f"{folder}/warehouse")
        snapshot = publish_scenes(warehouse, samples=96, size=(640, 480))
        model = SAMPLE if args.tiny else write_model(Path(folder, "model"), args.layers)
        recipe = Recipe(
            base_model=str(model),
            quantization="nf4",
            max_image_tokens=None if args.tiny else IMAGE_TOKENS,
            max_steps=args.steps,
            batch_size=args.batch,
            save_steps=5,
            early_stop_patience=3,
            max_new_tokens=16,
        )

        started = time.perf_counter()
        try:
            checked = preflight(snapshot, recipe, warehouse=warehouse, on_log=print).ref
        except PreflightFailed as failed:  # random weights: what they say need not depend on images
            checked = failed.ref
        seconds["preflight"] = time.perf_counter() - started
        findings = warehouse.read_table(checked.table, ["status", "check", "subject", "measured", "wanted"]).to_pylist()
        for finding in findings:
            print(*finding.values(), sep=" | ")
        counts = Counter(finding["status"] for finding in findings)
        figures["preflight"] = ", ".join(f"{number} {status}" for status, number in counts.items())

        started = time.perf_counter()
        evaluate(snapshot, recipe, run=None, warehouse=warehouse, on_log=print)
        seconds["evaluate_before"] = time.perf_counter() - started

        started = time.perf_counter()
        run = train(snapshot, recipe, warehouse=warehouse, on_log=print).ref
        seconds["train"] = time.perf_counter() - started
        figures |= figures_of(run, warehouse)

        started = time.perf_counter()
        evaluate(snapshot, recipe, run=run, warehouse=warehouse, on_log=print)
        seconds["evaluate_after"] = time.perf_counter() - started

        started = time.perf_counter()
        [row] = warehouse.read_table(merge(run, warehouse=warehouse, on_log=print).ref.table).to_pylist()
        seconds["merge"] = time.perf_counter() - started
        figures |= {name: row[name] for name in ("method", "kl_per_token", "max_logit_difference", "agreement")}
        [trained] = warehouse.read_table(run.table).to_pylist()

    figures |= {f"{name}_seconds": value for name, value in seconds.items()}
    for name, value in figures.items():
        print(f"{name:28} {value:,.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if not args.tiny:
        record(
            "gpu_qlora",
            figures,
            device=trained["device"],
            layers=args.layers,
            recipe=recipe.model_dump(exclude={"base_model"}),
        )


if __name__ == "__main__":
    main()
