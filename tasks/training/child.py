"""The training process: loads the base model, adds LoRA, trains with TRL and leaves the adapter in a folder.

It needs no warehouse: the examples come as a file, the results go into the folder it is given.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, set_seed
from trl.trainer.sft_config import SFTConfig

from storage.fingerprint import fingerprint
from tasks.training import model as models
from tasks.training.batches import BatchedTrainer, PaddedCollator, make_batches
from tasks.training.checkpoints import MarkComplete, last_complete_checkpoint
from tasks.training.conversations import check_loss, make_collator
from tasks.training.dataset import read_examples
from tasks.training.features import with_features
from tasks.training.metrics import METRICS, WriteMetrics
from tasks.training.recipe import Recipe
from tasks.training.speed import quicken
from tasks.training.template import stop_ids

log = logging.getLogger(__name__)

CHECKED_ROWS = 8


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train, going on from the last complete checkpoint in `folder` if there is one.

    `config` holds recipe, model (folder), examples (file), validation (file, if the recipe stops early) and
    parent_adapter (folder or null). Leaves `adapter/` and `metrics.jsonl` in `folder`; returns what the run's record
    needs.
    """
    recipe = Recipe.model_validate(config["recipe"])
    placement = models.place(recipe)
    recipe.check_learning_rates(four_bit=placement.four_bit)
    processor = models.load_processor(config["model"], recipe)
    base = models.load_model(config["model"], placement)
    set_seed(recipe.seed)  # LoRA's initial weights are random
    model = _adapted(base, recipe, config["parent_adapter"])
    log.info("LoRA on %d linear layers, %.2f M weights", len(models.lora_names(model)), _trainable(model) / 1e6)
    examples = read_examples(Path(config["examples"]))
    train_model(model, processor, examples, recipe, placement, folder)
    model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)  # an unfilled form; the run's table says more
    return _result(model, processor, placement, folder)


def train_model(
    model: PeftModel,
    processor: ProcessorMixin,
    examples: Dataset,
    recipe: Recipe,
    placement: models.Placement,
    folder: Path,
) -> None:
    """Train `model` in place, going on from the last complete checkpoint in `folder` if there is one.

    `examples` are rows of `dataset.FEATURES` or `documents.FEATURES`. Leaves `checkpoints/` and `metrics.jsonl` in
    `folder`. Raises `LossMaskError` before the first step if the loss would cover what it should not.
    """
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    rendered = make_collator(processor, examples, stop_ids(base))
    check_loss(rendered, islice(examples, CHECKED_ROWS))
    batches = make_batches(examples, processor, rendered, recipe)
    passes = math.ceil(len(examples) / recipe.batch_size) if batches is None else len(batches)
    args = _arguments(passes, recipe, placement, folder)
    epochs = args.max_steps * recipe.accumulation / passes
    collator = with_features(rendered, model, examples, recipe, epochs=epochs, folder=folder)
    on_gpu = placement.device.type == "cuda"
    if on_gpu or batches is not None:  # compiled layers see few shapes
        collator = PaddedCollator(collator, cast(Any, processor).tokenizer.pad_token_id)
    trainer = BatchedTrainer(
        model=model,
        args=args,
        train_dataset=examples,
        processing_class=processor,
        data_collator=collator,
        batches=batches,
        callbacks=[WriteMetrics(folder / METRICS), MarkComplete()],
    )
    trainer.remove_callback(PrinterCallback)
    quicken(model, recipe, on_gpu=on_gpu, batches=args.max_steps * recipe.accumulation)
    for weight in model.parameters():
        if weight.requires_grad:  # TRL casts LoRA on a 4-bit base to bf16, which is too coarse to add small steps to
            weight.data = weight.data.float()
    checkpoint = last_complete_checkpoint(folder / "checkpoints")
    if checkpoint:
        log.info("going on from %s", checkpoint.name)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _arguments(passes: int, recipe: Recipe, placement: models.Placement, folder: Path) -> SFTConfig:
    on_gpu = placement.device.type == "cuda"
    steps = recipe.max_steps or max(1, math.ceil(recipe.epochs * math.ceil(passes / recipe.accumulation)))
    log.info("%d steps of %d forward passes; an epoch has %d", steps, recipe.accumulation, passes)
    return SFTConfig(
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
        gradient_checkpointing=False,  # speed.py does it, layer by layer
        max_length=None,  # truncation would cut image tokens
        dataloader_num_workers=min(8, (os.cpu_count() or 1) - 1) if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        save_steps=recipe.save_steps,
        save_total_limit=2,  # the newest may be half-written when the process is killed
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )


def _trainable(model: PeftModel | PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


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
        "chat_template_fingerprint": fingerprint(collator.chat_template or collator.processor.chat_template),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
