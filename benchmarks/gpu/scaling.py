"""How fast several GPUs train one model, and how much memory loading and training take on each.

    python -m benchmarks.gpu.scaling lora --layers 30 1:none 2:none 2:fsdp
    python -m benchmarks.gpu.scaling full --shape half --layers 24 1:none 2:fsdp 2:zero3
    python -m benchmarks.gpu.scaling full --layers 12 2:fsdp

A way to train is GPUS:SHARDING; all take the same samples in each step, and losses are compared with those of one GPU.
lora is QLoRA (NF4) of a random Gemma 4 of the 31B's width, full trains one from files in bf16, by which loading is
measured too. Each way's row is recorded as soon as it is done, also when it fails or `--limit` cuts it short; rows of
earlier calls stay. `--tiny` takes a model of the sample's size and records nothing; its speed means nothing.
"""

import argparse
import json
import resource
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM, GenerationConfig, set_seed

from benchmarks.gpu.qlora_smoke import IMAGE_TOKENS
from benchmarks.gpu.scenes import publish_scenes
from benchmarks.gpu.shapes import SAMPLE, gemma4_31b, gemma4_half, random_model, tiny, write_processor
from benchmarks.record import RESULTS, record
from storage.warehouse import Warehouse
from tasks.training import distributed
from tasks.training import model as models
from tasks.training.child import train_model
from tasks.training.dataset import read_examples, write_examples
from tasks.training.gpu import reserved_gpus
from tasks.training.metrics import read_metrics
from tasks.training.process import ChildFailed, run_child
from tasks.training.recipe import Recipe
from tasks.training.trainer import Trainer

SHAPES = {"31B": gemma4_31b, "half": gemma4_half}
WARM_UP_STEPS = 3
NOISE = 0.02  # relative difference of a step's loss that sums in another order, in bf16, may make
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"quantization": "nf4"},
    "full": {"method": "full", "full_parts": ["language", "projector"], "learning_rate": 1e-5},
}

Row = dict[str, Any]


class TimeUp(Exception):  # noqa: N818 - no fault
    """A way took longer than it may."""


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """In a child: write a random model if `config` says so, else train in one of several processes.

    A training returns seconds until its first forward pass, and memory by rank, bytes: `loading` up to that pass,
    `training` from the second step, `host` of the process in RAM.
    """
    started = time.monotonic()
    recipe = Recipe.model_validate(config["recipe"])
    if config["write"]:
        write_weights(Path(recipe.base_model))
        return {}
    placement = models.place(recipe)
    processor = models.load_processor(recipe.base_model, recipe)
    with distributed.loading(recipe, placement.dtype):
        base = models.load_model(recipe.base_model, placement) if config["files"] else made(recipe, placement)
        set_seed(recipe.seed)
        model = models.make_trainable(base, recipe, parent=None)
    memory = Memory(model, passes=distributed.passes_per_process(recipe), started=started)
    Trainer._save_checkpoint = _save_nothing  # type: ignore[method-assign] # 12 bytes a weight, after the last step
    train_model(model, processor, read_examples(Path(config["examples"])), recipe, placement, folder)
    figures = distributed.of_all(memory.figures())
    distributed.leave()
    return {name: [of[name] for of in figures] for name in figures[0]} | {"device": str(placement)}


def made(recipe: Recipe, placement: models.Placement) -> Any:
    """Return a random model of the configuration in the recipe's folder, made on the GPU."""
    config = AutoConfig.from_pretrained(recipe.base_model)
    storage = placement.dtype if placement.sharded else torch.uint8
    return random_model(
        config, four_bit=placement.four_bit, device=placement.device, dtype=placement.dtype, storage=storage
    )


def write_weights(folder: Path) -> None:
    """Write random weights in bfloat16 beside the configuration in `folder`."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForMultimodalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig.from_pretrained(SAMPLE)
    model.save_pretrained(folder)


def _save_nothing(self: Trainer, *_: object) -> None:
    Path(self.args.output_dir, f"checkpoint-{self.state.global_step}").mkdir(parents=True, exist_ok=True)


class Memory:
    """Notes the most memory that is held until a model's first forward pass, and from its second step on."""

    def __init__(self, model: torch.nn.Module, *, passes: int, started: float) -> None:
        self.loading = 0
        self.seconds = 0.0
        self._passes, self._started, self._number = passes, started, count()
        model.register_forward_pre_hook(self._note)

    def _note(self, *_: object) -> None:
        number = next(self._number)
        if number == 0:
            self.loading, self.seconds = _held(), time.monotonic() - self._started
            print(f"first forward pass after {self.seconds:.1f} s; loading took {self.loading / 2**30:.2f} GiB")
        if number in (0, self._passes) and torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def figures(self) -> dict[str, float]:
        """Return what was noted."""
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
        return {"seconds": self.seconds, "loading": self.loading, "training": _held(), "host": host}


def _held() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def measure(recipe: Recipe, examples: Path, *, files: bool, limit: float) -> Row:
    """Train as the recipe says in processes of its own, for so many seconds at most; return what came of it."""
    config = {"recipe": recipe.model_dump(), "examples": str(examples), "files": files, "write": False}
    row: Row = {"gpus": recipe.gpus, "sharding": recipe.sharding}
    with tempfile.TemporaryDirectory() as folder, reserved_gpus(print, recipe.gpus) as gpus:
        try:
            with at_most(limit):
                result = run_child(
                    "benchmarks.gpu.scaling", config, folder=Path(folder), on_log=say, gpus=gpus, processes=recipe.gpus
                )
            row |= {"device": result["device"], "seconds_to_first_pass": max(result["seconds"])}
            row |= {f"{name}_gib": [of / 2**30 for of in result[name]] for name in ("loading", "training", "host")}
        except (TimeUp, ChildFailed) as error:
            row["unfinished"] = str(error)[-2000:]
        steps = read_metrics(Path(folder))
    timed = steps[WARM_UP_STEPS:]
    if timed:
        row["tokens_per_second"] = sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed)
    return row | {"losses": [step["loss"] for step in steps], "norms": [step["grad_norm"] for step in steps]}


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in the block when the seconds are over."""

    def stop(*_: object) -> None:
        raise TimeUp(f"stopped after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def say(line: str) -> None:
    """Print a line as soon as it comes, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def compare(row: Row, alone: Row | None) -> Row:
    """Return the speed-up over one GPU, its share of the ideal, and the largest relative difference of a loss."""
    if alone is None or row is alone or not row["losses"]:
        return {}
    pairs = list(zip(alone["losses"], row["losses"], strict=False))
    found: Row = {"largest_loss_difference": max((abs(one - other) / one for one, other in pairs), default=None)}
    if "tokens_per_second" in row and "tokens_per_second" in alone:
        speedup = row["tokens_per_second"] / alone["tokens_per_second"]
        found |= {"speedup": speedup, "efficiency": speedup / row["gpus"]}
    return found


def keep(name: str, row: Row, settings: Mapping[str, Any]) -> None:
    """Record the row with those of earlier measurements, in place of one of the same way and settings."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["details"]["rows"] if path.exists() else []
    keys = (*settings, "gpus", "sharding")
    row = {**settings, **row}
    rows = [other for other in rows if any(other[key] != row[key] for key in keys)] + [row]
    figures = {
        f"{figure}_{other['shape']}_{other['layers']}_{other['gpus']}_{other['sharding']}": other[figure]
        for other in rows
        for figure in ("tokens_per_second", "speedup", "largest_loss_difference")
        if other.get(figure) is not None
    }
    record(name, figures, device=row.get("device"), rows=rows)


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("ways", nargs="+", metavar="GPUS:SHARDING", help="such as 1:none 2:none 2:fsdp 4:zero3")
    parser.add_argument("--shape", choices=list(SHAPES), default="31B", help="half: half the 31B's width")
    parser.add_argument("--layers", type=int, default=30, help="decoder layers, a multiple of 6; the 31B has 60")
    parser.add_argument("--steps", type=int, default=8, help="the first 3 are not timed")
    parser.add_argument("--batch", type=int, default=8, help="samples in one forward pass on one GPU")
    parser.add_argument("--accumulation", type=int, default=4, help="forward passes of a step, shared by the GPUs")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a way may take")
    parser.add_argument("--folder", type=Path, help="where model files go for the time; a fast disk, or /dev/shm")
    parser.add_argument("--tiny", action="store_true", help="a model of the sample's size, on whatever device there is")
    return parser.parse_args()


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Recipe, Path]:
    """Write the model's files and the examples; return the recipe for one GPU and the examples' path."""
    model = write_processor(folder / "model", tiny() if args.tiny else SHAPES[args.shape](args.layers))
    recipe = Recipe(
        base_model=str(model.absolute()),
        max_image_tokens=None if args.tiny else IMAGE_TOKENS,
        checkpointed_share=1.0,
        compile=False,
        max_steps=args.steps,
        save_steps=args.steps + 1,
        batch_size=args.batch,
        accumulation=args.accumulation,
        **METHODS[args.method],
    )
    warehouse = Warehouse(str(folder / "warehouse"))
    snapshot = publish_scenes(warehouse, samples=args.batch * args.accumulation * 4, size=(480, 480))
    path = folder / "examples.arrow"
    write_examples(snapshot, recipe, split="train", warehouse=warehouse, path=path)
    if args.method == "full":
        started = time.monotonic()
        with reserved_gpus(print) as gpus, tempfile.TemporaryDirectory() as own:
            config = {"recipe": recipe.model_dump(), "write": True}
            run_child("benchmarks.gpu.scaling", config, folder=Path(own), on_log=say, gpus=gpus)
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        say(f"{size / 2**30:.1f} GiB of weights written in {time.monotonic() - started:.0f} s")
    return recipe, path


def main() -> None:
    """Measure each way, compare it with one GPU, print and record."""
    args = arguments()
    settings = {name: getattr(args, name) for name in ("shape", "layers", "batch", "accumulation")}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        recipe, examples = prepare(args, Path(folder))
        for way in args.ways:
            gpus, _, sharding = way.partition(":")
            say(f"--- {args.method}, {gpus} GPUs, sharding {sharding}")
            shared = Recipe.model_validate({**recipe.model_dump(), "gpus": int(gpus), "sharding": sharding})
            row = measure(shared, examples, files=args.method == "full", limit=args.limit)
            rows.append(row)
            row |= compare(row, next((other for other in rows if other["gpus"] == 1), None))
            print(json.dumps(row), flush=True)
            if not args.tiny:
                keep(f"gpu_scaling_{args.method}", row, settings)
    worst = max((row.get("largest_loss_difference") or 0.0 for row in rows), default=0.0)
    if worst > NOISE:
        raise SystemExit(f"losses differ by {worst:.1%} from those of one GPU, more than noise ({NOISE:.0%})")


if __name__ == "__main__":
    main()
