"""How much faster two GPUs train than one: whole model on each (data parallel) and shared between them (FSDP2).

    python -m benchmarks.gpu.scaling --layers 60
    python -m benchmarks.gpu.scaling --layers 12 --quantization none --sharding zero3

Trains LoRA on a random Gemma 4 of the 31B's width, the same steps each time, and compares losses step by step.
`--tiny` takes the model that ships with the sample and, without GPUs, data-parallel processes; its speed means nothing.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, set_seed

from benchmarks.gpu.qlora_smoke import IMAGE_TOKENS
from benchmarks.gpu.scenes import publish_scenes
from benchmarks.gpu.shapes import SAMPLE, gemma4_31b, random_model
from benchmarks.record import record
from storage.warehouse import Warehouse
from tasks.training import distributed
from tasks.training import model as models
from tasks.training.child import train_model
from tasks.training.dataset import read_examples, write_examples
from tasks.training.gpu import reserved_gpus, visible_gpus
from tasks.training.metrics import peak_memory
from tasks.training.process import run_child
from tasks.training.recipe import Recipe

WARM_UP_STEPS = 3
FIGURES = ("tokens_per_second", "peak_gib", "speedup", "efficiency", "largest_loss_difference")
NOISE = 0.02  # relative difference of a step's loss that sums in another order, in bf16, may make


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train in one of several processes, as the main program started them; return each process's peak memory."""
    recipe = Recipe.model_validate(config["recipe"])
    placement = models.place(recipe)
    processor = AutoProcessor.from_pretrained(SAMPLE)
    if config["layers"]:
        processor.image_processor.pooling_kernel_size = 3
        processor.image_processor.max_soft_tokens = processor.image_seq_length = IMAGE_TOKENS
        storage = placement.dtype if placement.sharded else torch.uint8
        base = random_model(
            gemma4_31b(config["layers"]),
            four_bit=placement.four_bit,
            device=placement.device,
            dtype=placement.dtype,
            storage=storage,
        )
    else:
        base = models.load_model(SAMPLE, placement)
    set_seed(recipe.seed)
    model = models.add_lora(base, recipe, base_model="random")
    measure_memory_from_second_step(model, distributed.passes_per_process(recipe))
    train_model(model, processor, read_examples(Path(config["examples"])), recipe, placement, folder)
    memory = distributed.of_all(peak_memory())
    distributed.leave()
    return {"memory": memory, "device": str(placement)}


def measure_memory_from_second_step(model: torch.nn.Module, passes: int) -> None:
    """Forget the memory that loading took, before the model was shared, once it has made `passes` forward passes."""
    number = count()

    def forget(*_: object) -> None:
        if next(number) == passes and torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    model.register_forward_pre_hook(forget)


def measure(recipe: Recipe, examples: Path, layers: int) -> dict[str, Any]:
    """Train as the recipe says in processes of its own; return tokens/s after the warm-up, peak memory and losses."""
    with tempfile.TemporaryDirectory() as folder, reserved_gpus(print, recipe.gpus) as gpus:
        config = {"recipe": recipe.model_dump(), "examples": str(examples), "layers": layers}
        result = run_child(
            "benchmarks.gpu.scaling", config, folder=Path(folder), on_log=print, gpus=gpus, processes=recipe.gpus
        )
        steps = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    timed = steps[WARM_UP_STEPS:]
    return {
        "name": "alone" if recipe.gpus == 1 else {"none": "data_parallel"}.get(recipe.sharding, recipe.sharding),
        "gpus": recipe.gpus,
        "tokens_per_second": sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed),
        "peak_gib": max((held or 0) / 2**30 for held in result["memory"]),
        "peak_gib_by_rank": [(held or 0) / 2**30 for held in result["memory"]],
        "losses": [step["loss"] for step in steps],
        "device": result["device"],
    }


def shared(recipe: Recipe, gpus: int, sharding: str) -> Recipe:
    """Return the recipe for so many GPUs, checked."""
    return Recipe.model_validate({**recipe.model_dump(), "gpus": gpus, "sharding": sharding})


def compare(alone: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """Return the speed-up over one GPU, its share of the ideal, and the largest relative difference of a loss."""
    speedup = shared["tokens_per_second"] / alone["tokens_per_second"]
    pairs = zip(alone["losses"], shared["losses"], strict=True)
    return {
        "speedup": speedup,
        "efficiency": speedup / shared["gpus"],
        "largest_loss_difference": max(abs(one - other) / one for one, other in pairs),
    }


def main() -> None:
    """Measure one GPU and several, compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=60, help="decoder layers, a multiple of 6; the 31B has 60")
    parser.add_argument("--steps", type=int, default=10, help="the first 3 are not timed")
    parser.add_argument("--batch", type=int, default=8, help="samples in one forward pass on one GPU")
    parser.add_argument("--accumulation", type=int, default=4, help="forward passes of a step, shared by the GPUs")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--sharding", choices=["fsdp", "zero3"], default="fsdp", help="beside data parallel")
    parser.add_argument("--tiny", action="store_true", help="the sample's model, on whatever device there is")
    args = parser.parse_args()

    ways: list[tuple[int, str]] = [(1, "none"), (args.gpus, "none")]
    if visible_gpus():
        ways.append((args.gpus, args.sharding))  # accelerate shards on GPUs only
    with tempfile.TemporaryDirectory() as folder:
        warehouse = Warehouse(f"{folder}/warehouse")
        snapshot = publish_scenes(warehouse, samples=args.batch * args.accumulation * 4, size=(480, 480))
        recipe = Recipe(
            base_model=str(SAMPLE),
            quantization=args.quantization,
            checkpointed_share=1.0,
            max_steps=args.steps,
            save_steps=args.steps + 1,
            batch_size=args.batch,
            accumulation=args.accumulation,
        )
        path = Path(folder, "examples.arrow")
        examples = write_examples(snapshot, recipe, split="train", warehouse=warehouse, path=path).path
        layers = 0 if args.tiny else args.layers
        found = [measure(shared(recipe, gpus, sharding), examples, layers) for gpus, sharding in ways]
    alone, *others = found
    for way in others:
        way |= compare(alone, way)
    figures = {f"{name}_{way['name']}": way[name] for way in found for name in FIGURES if name in way}
    for name, value in figures.items():
        print(f"{name:40} {value:12,.4f}")
    if not args.tiny:
        device = f"{args.gpus} × {alone['device']}"
        name = f"gpu_scaling_{args.sharding}"
        record(name, figures, device=device, layers=args.layers, recipe=recipe.model_dump(), ways=found)
    worst = max(way["largest_loss_difference"] for way in others)
    if worst > NOISE:
        raise SystemExit(f"losses differ by {worst:.1%} from those of one GPU, more than noise ({NOISE:.0%})")


if __name__ == "__main__":
    main()
