"""The training process: loads the base model, adds LoRA, trains with TRL and leaves the adapter in a folder.

It needs no warehouse: the examples come as a file, the results go into the folder it is given.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProcessorMixin,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from storage.fingerprint import fingerprint
from tasks.training import model as models
from tasks.training.batches import BatchedTrainer, PaddedCollator, TokenBatches, make_batches
from tasks.training.collate import CompletionCollator
from tasks.training.conversations import ConversationCollator, check_loss, make_collator
from tasks.training.dataset import read_examples
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids

log = logging.getLogger(__name__)

CHECKED_ROWS = 8
PROGRESS_SECONDS = 5.0
COMPLETE = "complete"
METRICS = "metrics.jsonl"


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train, going on from the last complete checkpoint in `folder` if there is one.

    `config` holds recipe, model (folder), examples (file) and parent_adapter (folder or null). Leaves `adapter/` and
    `metrics.jsonl` in `folder`; returns what the run's record needs.
    """
    recipe = Recipe.model_validate(config["recipe"])
    placement = models.place(recipe)
    processor = models.load_processor(config["model"], recipe)
    base = models.load_model(config["model"], placement)
    set_seed(recipe.seed)  # LoRA's initial weights are random
    model = _adapted(base, recipe, config["parent_adapter"])
    log.info("LoRA on %d linear layers, %.2f M weights", len(models.lora_names(model)), _trainable(model) / 1e6)

    examples = read_examples(Path(config["examples"]))
    collator = make_collator(processor, examples, stop_ids(base))
    check_loss(collator, islice(examples, CHECKED_ROWS))

    batches = make_batches(examples, processor, collator, recipe, workers=_workers(placement))
    trainer = _trainer(model, processor, collator, examples, batches, recipe, placement, folder)
    checkpoint = last_complete_checkpoint(folder / "checkpoints")
    if checkpoint:
        log.info("going on from %s", checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # an unfilled form; the run's table says more
    return _result(model, processor, placement, folder)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose last file was written, or None. What a kill left half-written is ignored."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _adapted(base: PreTrainedModel, recipe: Recipe, parent_adapter: str | None) -> PeftModel:
    if parent_adapter is None:
        return models.add_lora(base, recipe, base_model=recipe.base_model)
    log.info("starting from the parent run's adapter")
    return models.load_adapter(base, parent_adapter, trainable=True)


def _trainable(model: PeftModel) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _trainer(
    model: PeftModel,
    processor: ProcessorMixin,
    collator: CompletionCollator | ConversationCollator,
    examples: Dataset,
    batches: TokenBatches | None,
    recipe: Recipe,
    placement: models.Placement,
    folder: Path,
) -> SFTTrainer:
    on_gpu = placement.device.type == "cuda"
    passes = math.ceil(len(examples) / recipe.batch_size) if batches is None else len(batches)
    steps = recipe.max_steps or max(1, math.ceil(recipe.epochs * math.ceil(passes / recipe.accumulation)))
    log.info("%d examples, %d steps of %d forward passes", len(examples), steps, recipe.accumulation)
    args = SFTConfig(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup * steps),
        seed=recipe.seed,
        bf16=placement.dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        gradient_checkpointing=recipe.gradient_checkpointing,
        # Reentrant checkpointing gives wrong gradients where layers share keys and values (Gemma 4 E2B and E4B).
        gradient_checkpointing_kwargs={"use_reentrant": False},
        max_length=None,  # truncation would cut image tokens
        dataloader_num_workers=_workers(placement),
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        save_steps=recipe.save_steps,
        save_total_limit=2,  # the newest may be half-written when the process is killed
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = BatchedTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        processing_class=processor,
        data_collator=collator if batches is None else PaddedCollator(collator, processor.tokenizer.pad_token_id),
        batches=batches,
        callbacks=[_Progress(folder / METRICS)],
    )
    trainer.remove_callback(PrinterCallback)
    for weight in model.parameters():
        if weight.requires_grad:  # TRL casts LoRA on a 4-bit base to bf16, which is too coarse to add small steps to
            weight.data = weight.data.float()
    return trainer


def _workers(placement: models.Placement) -> int:
    """Processes that read, decode and resize images while the GPU computes."""
    return min(8, (os.cpu_count() or 1) - 1) if placement.device.type == "cuda" else 0


class _Progress(TrainerCallback):
    """Writes a line of metrics for every step, prints one now and then, and marks checkpoints that are whole."""

    def __init__(self, metrics: Path) -> None:
        self.metrics = metrics
        self.printed = self.last = time.monotonic()
        self.tokens = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        self.metrics.write_text("".join(f"{line}\n" for line in lines[: state.global_step]))  # the rest comes again
        self.last = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        now = time.monotonic()
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "token_accuracy": logs["mean_token_accuracy"],
            "entropy": logs["entropy"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": int(logs["num_tokens"]) - self.tokens,
            "seconds": now - self.last,
        }
        self.last, self.tokens = now, int(logs["num_tokens"])
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if now - self.printed >= PROGRESS_SECONDS or state.global_step in (1, state.max_steps):
            self.printed = now
            log.info(
                "step %d of %d: loss %.4f, token accuracy %.3f, %.0f tokens/s",
                *(line["step"], state.max_steps, line["loss"], line["token_accuracy"]),
                line["tokens"] / line["seconds"],
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert args.output_dir is not None
        Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE).touch()


def _result(model: PeftModel, processor: ProcessorMixin, placement: models.Placement, folder: Path) -> dict[str, Any]:
    steps = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    tail = steps[-10:]
    four_bit = sum(map(models.is_four_bit, models.linear_names(model).values()))
    on_gpu = placement.device.type == "cuda"
    return {
        "steps": len(steps),
        "train_loss": sum(step["loss"] for step in tail) / len(tail),
        "tokens": sum(step["tokens"] for step in steps),
        "seconds": sum(step["seconds"] for step in steps),
        "device": str(placement),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "lora_layers": len(models.lora_names(model)),
        "lora_weights": _trainable(model),
        "four_bit_layers": four_bit,
        "chat_template_fingerprint": fingerprint(processor.chat_template),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
