"""QLoRA from snapshot to merged model on one GPU, with a random Gemma 4 of the 31B's width and a few of its layers.

    python -m benchmarks.gpu.qlora_smoke --layers 6 --steps 20

`--tiny` takes the model that ships with the sample instead and runs anywhere; its speed means nothing.
"""

import argparse
import io
import json
import random
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GenerationConfig,
)

from benchmarks.record import record
from storage.refs import RunRef, SnapshotRef
from storage.schema import CURATED
from storage.snapshot import Draft, FileEntry, commit
from storage.warehouse import Warehouse
from tasks.adapters.merge import merge
from tasks.curation.scene import describe, draw_scene, render
from tasks.evaluation.generate import evaluate
from tasks.training.fit import train
from tasks.training.recipe import Recipe

SAMPLE = Path("tasks/sample_models/gemma")
WARM_UP_STEPS = 3
IMAGE_TOKENS = 280


def build_config(layers: int) -> Gemma4Config:
    """The configuration of Gemma 4 31B with fewer decoder layers and the sample's token ids."""
    text = Gemma4TextConfig(
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        use_bidirectional_attention="vision",
        hidden_size_per_layer_input=0,
        sliding_window=1024,
        final_logit_softcapping=30.0,
    )
    vision = Gemma4VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=72,
        standardize=True,
    )
    sample = json.loads((SAMPLE / "config.json").read_text())
    tokens = {name: value for name, value in sample.items() if "token" in name and value is not None}
    return Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **tokens)


def write_model(folder: Path, layers: int) -> Path:
    """Write a random model of `build_config` in bfloat16, with the sample's processor set to its image size."""
    processor = AutoProcessor.from_pretrained(SAMPLE)
    processor.image_processor.pooling_kernel_size = 3
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForMultimodalLM.from_config(build_config(layers), dtype=torch.bfloat16)
    model.generation_config = GenerationConfig.from_pretrained(SAMPLE)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def publish_scenes(warehouse: Warehouse, samples: int) -> SnapshotRef:
    """Publish scenes of 640×480 pixels as a snapshot: `samples` to train on, 16 for validation and 16 for test."""
    rng = random.Random(0)
    rows = []
    for at in range(samples + 32):
        scene, picture = draw_scene(rng), io.BytesIO()
        render(scene, size=(640, 480), seed=at).save(picture, "JPEG")
        row = {
            "sample_id": f"{at:032x}",
            "image": {"bytes": picture.getvalue(), "path": f"{at}.jpg"},
            "caption": describe(scene, rng),
            "split": "train" if at < samples else ("validation", "test")[at % 2],
        }
        rows.append(row)
    path = "snapshots/scenes/curated/scenes.parquet"
    warehouse.write_table(path, pa.Table.from_pylist(rows, schema=CURATED))
    entry = FileEntry(path=path, rows=len(rows), bytes=0, sha256="scenes", pool_shard="scenes")
    draft = Draft(
        pool="scenes",
        pool_shards=("scenes",),
        policy={},
        signals={},
        pairs={},
        decisions=(),
        curated=(entry,),
        holdout=None,
        counts={},
    )
    return commit(warehouse, "scenes", lambda latest: draft).ref


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
        "lora_weights_millions": result["lora_weights"] / 1e6,
        "first_loss": warehouse.read_table(f"{run.folder}/metrics.parquet")["loss"][0].as_py(),
        "last_loss": result["train_loss"],
    }


def main() -> None:
    """Train, evaluate before and after, and merge; print and record the figures."""
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
        snapshot = publish_scenes(warehouse, samples=96)
        model = SAMPLE if args.tiny else write_model(Path(folder, "model"), args.layers)
        recipe = Recipe(
            base_model=str(model),
            quantization="nf4",
            max_image_tokens=None if args.tiny else IMAGE_TOKENS,
            max_steps=args.steps,
            batch_size=args.batch,
            learning_rate=1e-4,
            max_new_tokens=16,
        )

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
