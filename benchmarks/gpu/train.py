"""Tokens a second of fine-tuning Gemma 4 on one GPU, from real shards: TRL as its documentation shows, and ours.

    python -m benchmarks.gpu.train                      # 31B, E4B and E2B: TRL, language, vision
    python -m benchmarks.gpu.train --only 31B:language  # one of them
    python -m benchmarks.gpu.train --tiny               # the sample's model, anywhere; its speed means nothing

Each training runs in a process of its own and takes samples of about 300 tokens, 256 of them one image.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.gpu.scenes import publish_scenes
from benchmarks.gpu.shapes import SHAPES, random_model, tiny, write_processor
from benchmarks.record import RESULTS, record
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.child import train_model
from tasks.training.conversations import make_collator
from tasks.training.dataset import read_examples, write_examples
from tasks.training.lengths import count_tokens
from tasks.training.memory.estimate import estimate
from tasks.training.metrics import METRICS
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids

WARM_UP_STEPS = 3
STEPS = 10
SAMPLES = 256
PEAK_FLOPS = 989e12
"""Dense bfloat16 operations a second of an H100 SXM."""


@dataclass(frozen=True)
class Setting:
    """What is trained how: samples in a forward pass, and the recipe's fields that differ."""

    batch: int
    options: dict[str, Any]


LANGUAGE: dict[str, Any] = {"cache_vision_features": True}
VISION: dict[str, Any] = {"lora_parts": ("language", "projector", "vision")}
SETTINGS = {
    "31B:trl": Setting(8, {"quantization": "nf4"}),
    "31B:language": Setting(10, {"quantization": "nf4", "checkpointed_share": 0.0, **LANGUAGE}),
    "31B:vision": Setting(10, {"quantization": "nf4", "checkpointed_share": 0.1, **VISION}),
    "E4B:trl": Setting(8, {"quantization": "none"}),
    "E4B:language": Setting(32, {"quantization": "none", "checkpointed_share": 0.0, **LANGUAGE}),
    "E4B:vision": Setting(24, {"quantization": "none", "checkpointed_share": 0.2, **VISION}),
    "E2B:trl": Setting(8, {"quantization": "none"}),
    "E2B:language": Setting(32, {"quantization": "none", "checkpointed_share": 0.0, **LANGUAGE}),
    "E2B:vision": Setting(32, {"quantization": "none", "checkpointed_share": 0.2, **VISION}),
}


def recipe_of(setting: Setting, model: Path) -> Recipe:
    """The recipe of a training here: rank 64 on every linear layer, two forward passes a step."""
    return Recipe(
        base_model=str(model),
        prompt="'What does the picture show? Name each shape, its size, its colour and where it is.'",
        max_image_tokens=280,
        max_steps=STEPS,
        batch_size=setting.batch,
        accumulation=2,
        learning_rate=5e-5,
        save_steps=1000,
        compile=True,
        **setting.options,
    )


def train_ours(model: PreTrainedModel, processor: Any, rows: Any, recipe: Recipe, folder: Path) -> None:
    """Train as a run does, but with a model made in memory."""
    adapted = models.make_trainable(model, recipe, parent=None)
    train_model(adapted, processor, rows, recipe, models.place(recipe), folder)


def train_trl(model: PreTrainedModel, processor: Any, rows: Any, recipe: Recipe, folder: Path) -> None:
    """Train as TRL's documentation shows for vision-language models and QLoRA."""
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.accumulation,
            max_steps=recipe.max_steps or STEPS,
            learning_rate=recipe.learning_rate,
            max_length=None,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=processor,
        peft_config=LoraConfig(r=64, lora_alpha=64, target_modules="all-linear"),
        callbacks=[KeepSpeed(folder / METRICS)],
    )
    trainer.train()


class KeepSpeed(TrainerCallback):
    """Writes the metrics that `figures` reads, for a trainer that does not do so by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens, self.last = 0, time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the step's line."""
        if not logs or "loss" not in logs:
            return
        now, tokens = time.monotonic(), int(logs["num_tokens"])
        line = {"loss": logs["loss"], "tokens": tokens - self.tokens, "seconds": now - self.last}
        self.tokens, self.last = tokens, now
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def measure(name: str, folder: Path, *, on_tiny: bool) -> dict[str, Any]:
    """Train one of SETTINGS in this process; return its figures."""
    shape, _, kind = name.partition(":")
    setting = SETTINGS[name]
    config = tiny() if on_tiny else SHAPES[shape]()
    model_folder = write_processor(folder / "processor", config)
    recipe = recipe_of(setting, model_folder)
    if on_tiny:
        recipe = recipe.model_copy(update={"max_image_tokens": None, "batch_size": 2, "compile": False})
    processor = models.load_processor(model_folder, recipe)
    rows = examples(recipe, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(config, four_bit=recipe.quantization == "nf4", device=device)
    weights = decoder_weights(model)
    base_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    train: Callable[..., None] = train_trl if kind == "trl" else train_ours
    train(model, processor, rows, recipe, folder)
    found = {"setting": name, "base_gib": base_bytes / 2**30} | figures(folder, weights, recipe)
    if kind != "trl":
        length = (
            -(-int(count_tokens(rows, processor, make_collator(processor, rows, stop_ids(model))).max()) // 64) * 64
        )
        predicted = estimate(
            config,
            recipe,
            batch=recipe.batch_size,
            sample_tokens=length,
            compiled=recipe.compile or False,
            checkpointed_share=recipe.checkpointed_share or 0.0,
        )
        print(f"predicted: {predicted}")
        found["predicted_peak_gib"] = predicted.peak_bytes / 2**30
    return found


def examples(recipe: Recipe, folder: Path, *, samples: int = SAMPLES) -> Any:
    """Rows read back from the shards of a published snapshot."""
    warehouse = Warehouse(str(folder / "warehouse"))
    snapshot = publish_scenes(warehouse, samples=samples, size=(480, 480))
    path = folder / "examples.arrow"
    write_examples(snapshot, recipe, split="train", warehouse=warehouse, path=path)
    return read_examples(path)


def decoder_weights(model: PreTrainedModel) -> int:
    """Weights of the language model's linear layers, 4-bit ones counted unpacked."""
    prefix = models.decoder_name(model) + "."
    linears = (layer for name, layer in models.linear_names(model).items() if name.startswith(prefix))
    return sum(layer.in_features * layer.out_features for layer in linears)


def figures(folder: Path, weights: int, recipe: Recipe) -> dict[str, Any]:
    """What the steps after the first ones did."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    steps = lines[WARM_UP_STEPS:]
    seconds = sum(step["seconds"] for step in steps)
    tokens = sum(step["tokens"] for step in steps)
    waits = [step["input_wait_seconds"] for step in steps if step.get("input_wait_seconds") is not None]
    return {
        "tokens_per_second": tokens / seconds,
        "samples_per_second": len(steps) * recipe.batch_size * recipe.accumulation / seconds,
        "tokens_per_sample": tokens / len(steps) / recipe.batch_size / recipe.accumulation,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        # frozen weights need no gradient: 2 operations a weight forward, 2 for the gradient of the input
        "utilisation": 4 * weights * tokens / seconds / PEAK_FLOPS,
        "input_wait_share": sum(waits) / seconds if waits else None,
        "batch": recipe.batch_size,
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
    }


def main() -> None:
    """Measure the settings asked for, each in a process of its own; print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--tiny", action="store_true", help="the sample's model, on whatever device there is")
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        result = measure(args.only[0], args.here, on_tiny=args.tiny)
        (args.here / "figures.json").write_text(json.dumps(result))
        return
    table: dict[str, dict[str, Any]] = {}
    for name in args.only:
        if found := _in_process(name, on_tiny=args.tiny):
            table[name] = found
            if not args.tiny:
                _record(table)  # after each: a run that is cut short leaves what it measured
    for row in table.values():
        print("  ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))


def _in_process(name: str, *, on_tiny: bool) -> dict[str, Any] | None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __spec__.name, "--only", name, "--here", folder]
        subprocess.run([*command, *(["--tiny"] if on_tiny else [])], check=False)
        path = Path(folder, "figures.json")
        if not path.exists():
            print(f"{name}: failed")
            return None
        found: dict[str, Any] = json.loads(path.read_text())
        print(json.dumps(found), flush=True)
        return found


def _record(found: dict[str, dict[str, Any]]) -> None:
    """Record the figures; settings that were not measured now keep those they had on the same kind of device."""
    device = torch.cuda.get_device_name(0)
    path = RESULTS / "gpu_train.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = before.get("trainings", []) if before.get("device") == device else []
    rows = {row["setting"]: row for row in kept} | found
    language, vision, trl = (rows.get(f"31B:{kind}", {}) for kind in ("language", "vision", "trl"))
    record(
        "gpu_train",
        {
            "tokens_per_second_language": language.get("tokens_per_second"),
            "tokens_per_second_vision": vision.get("tokens_per_second"),
            "tokens_per_second_trl": trl.get("tokens_per_second"),
            "peak_gib": language.get("peak_gib"),
            "predicted_peak_gib": language.get("predicted_peak_gib"),
            "input_wait_share": language.get("input_wait_share"),
            "trainings": [rows[name] for name in SETTINGS if name in rows],
        },
        device=device,
    )


if __name__ == "__main__":
    main()
