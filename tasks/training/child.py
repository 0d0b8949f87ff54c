"""The training process: loads the base model, makes it trainable, trains with TRL and leaves the result in a folder.

It needs no warehouse: the examples come as a file, the results go into the folder it is given.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, set_seed
from trl.trainer.sft_config import SFTConfig

from storage.fingerprint import fingerprint
from tasks.training import distributed
from tasks.training import model as models
from tasks.training.batches import PaddedCollator, TokenBatches, make_batches
from tasks.training.checkpoints import MarkComplete, checkpoints_folder, last_complete_checkpoint
from tasks.training.child_side import Stopped
from tasks.training.conversations import check_loss, make_collator
from tasks.training.dataset import read_examples
from tasks.training.divergence import Diverged, remember, versions
from tasks.training.families import without_adapter
from tasks.training.features import with_features
from tasks.training.interruption import StopWhenAsked
from tasks.training.metrics import KeepMetrics, peak_memory, read_metrics
from tasks.training.optimizer import early_stop, optimization_arguments
from tasks.training.order import Order
from tasks.training.out_of_memory import OUT_OF_MEMORY, REMEDY, OutOfMemory, Pieces, is_out_of_memory
from tasks.training.ranks import is_first, world_size
from tasks.training.recipe import Recipe
from tasks.training.speed import quicken
from tasks.training.template import stop_ids
from tasks.training.trainer import Trainer

log = logging.getLogger(__name__)

CHECKED_ROWS = 8

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train, going on from the last complete checkpoint in `folder` if there is one.

    `config` holds recipe, model (folder), examples (file), validation (file, if the recipe stops early) and
    parent_adapter (folder or null). Leaves `adapter/` and what `train_model` does in `folder`; returns what the run's
    record needs. Raises what `train_model` does. Several processes share the training when the environment says so
    (see `distributed`); the first of them writes.
    """
    recipe = Recipe.model_validate(config["recipe"])
    placement = models.place(recipe)
    recipe.check_learning_rates(four_bit=placement.four_bit)
    processor = models.load_processor(config["model"], recipe)
    with distributed.loading(recipe, placement.dtype):
        base = models.load_model(config["model"], placement)
        set_seed(recipe.seed)  # LoRA's initial weights are random
        model = models.make_trainable(base, recipe, parent=config["parent_adapter"])
    weights = distributed.trained_count(model)
    log.info("LoRA on %d linear layers; %.2f M weights to train", len(models.lora_names(model)), weights / 1e6)
    examples = read_examples(Path(config["examples"]))
    validation = read_examples(Path(config["validation"])) if recipe.early_stop_patience else None
    best = train_model(model, processor, examples, recipe, placement, folder, validation=validation)
    models.save_trained(model, folder / "adapter", recipe, dtype=placement.dtype)
    memory = distributed.of_all(peak_memory())
    distributed.leave()
    if not is_first():
        return {}
    rendering: Any = make_collator(processor, examples, stop_ids(base))
    return _result(model, placement, folder, memory) | {
        "trained_weights": weights,
        "validation_loss": best,
        "chat_template_fingerprint": fingerprint(rendering.chat_template or rendering.processor.chat_template),
    }


def train_model(
    model: PeftModel | PreTrainedModel,
    processor: ProcessorMixin,
    examples: Dataset,
    recipe: Recipe,
    placement: models.Placement,
    folder: Path,
    *,
    validation: Dataset | None = None,
) -> float | None:
    """Train `model` in place, going on from the last complete checkpoint in `folder` if there is one.

    `examples` and `validation` are rows of `dataset.FEATURES` or `documents.FEATURES`. Leaves `checkpoints/`,
    `metrics.jsonl` and `tensorboard/` in `folder`; returns the lowest loss on `validation`. Raises `LossMaskError`
    before the first step if the loss would cover what it should not, `OutOfMemory` if a single sample does not fit,
    `Diverged` at a loss that is not finite, and `Stopped` when SIGTERM ended it early, with a checkpoint.
    """
    base = without_adapter(model)
    rendered = make_collator(processor, examples, stop_ids(base))
    check_loss(rendered, islice(examples, CHECKED_ROWS))
    workers = _workers(placement)
    order = _order(examples, processor, rendered, recipe, workers=workers)
    steps = _count_steps(order, recipe) if isinstance(order, TokenBatches) else order.steps
    passes = steps * recipe.accumulation  # forward passes
    epochs = passes / len(order) if isinstance(order, TokenBatches) else len(order) / len(examples)
    collator: Collator = with_features(rendered, model, examples, recipe, epochs=epochs, folder=folder, workers=workers)
    if placement.device.type == "cuda" or isinstance(order, TokenBatches):  # compiled layers see few shapes
        collator = PaddedCollator(collator, cast(Any, processor).tokenizer.pad_token_id)
    stop = StopWhenAsked()
    trainer = Trainer(
        model=model,
        args=_arguments(base, steps, recipe, placement, folder),
        train_dataset=examples,
        eval_dataset=validation,
        processing_class=processor,
        collator=collator,
        order=order,
        pieces=Pieces(folder / OUT_OF_MEMORY, device=str(placement)),
        recipe=recipe,
        callbacks=[
            KeepMetrics(folder, passes=1 if isinstance(order, TokenBatches) else epochs),
            stop,
            MarkComplete(),
            *early_stop(recipe),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if placement.loaded_whole:
        for weight in model.parameters():
            if weight.requires_grad:  # TRL casts LoRA on a 4-bit base to bf16
                weight.data = weight.data.to(torch.float32)  # bf16 is too coarse to add small steps to
    quicken(model, recipe, placement, examples=examples, processor=processor, collator=rendered, passes=passes)
    distributed.prepare(trainer, recipe, loaded_whole=placement.loaded_whole)
    with stop.listening():
        _train(trainer, folder, recipe)
    done = trainer.state.global_step
    if stop.asked and done < steps:
        raise Stopped(f"stopped after step {done} of {steps}; it goes on from there when it is run again")
    return trainer.state.best_metric


def _workers(placement: models.Placement) -> int:
    """Processes that prepare batches; without a GPU there is nothing for them to overlap with."""
    return min(8, (os.cpu_count() or 1) // world_size() - 1) if placement.device.type == "cuda" else 0


def _order(
    examples: Dataset, processor: ProcessorMixin, rendered: Any, recipe: Recipe, *, workers: int
) -> Order | TokenBatches:
    batches = make_batches(examples, processor, rendered, recipe, processes=world_size(), workers=workers)
    if batches is not None:
        return batches
    per_step = recipe.batch_size * recipe.accumulation
    steps = recipe.max_steps or max(1, math.ceil(recipe.epochs * len(examples) / per_step))
    return Order(len(examples), steps=steps, per_step=per_step, seed=recipe.seed)


def _count_steps(batches: TokenBatches, recipe: Recipe) -> int:
    return recipe.max_steps or max(1, math.ceil(recipe.epochs * math.ceil(len(batches) / recipe.accumulation)))


def _train(trainer: Trainer, folder: Path, recipe: Recipe) -> None:
    checkpoint = last_complete_checkpoint(checkpoints_folder(folder, recipe))
    if checkpoint:
        log.info("going on from %s", checkpoint.name)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Diverged as error:
        remember(error, folder)
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory outside the forward and backward pass: {error}. {REMEDY}") from None


def _arguments(
    model: PreTrainedModel, steps: int, recipe: Recipe, placement: models.Placement, folder: Path
) -> SFTConfig:
    on_gpu = placement.device.type == "cuda"
    log.info("%d steps of %d forward passes", steps, recipe.accumulation)
    return SFTConfig(
        output_dir=str(checkpoints_folder(folder, recipe)),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=distributed.passes_per_process(recipe),
        max_steps=steps,
        seed=recipe.seed,
        bf16=placement.dtype == torch.bfloat16,
        use_cpu=not on_gpu,
        gradient_checkpointing=False,  # speed.py does it, layer by layer
        max_length=None,  # truncation would cut image tokens
        dataloader_num_workers=_workers(placement),
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        save_steps=recipe.save_steps,
        save_total_limit=2,  # the newest may be half-written when the process is killed
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log the last finite loss in place of one that is not
        report_to="none",
        disable_tqdm=True,
        **optimization_arguments(recipe, steps=steps),
        **distributed.trainer_arguments(recipe, model),
    )


def _result(
    model: PeftModel | PreTrainedModel, placement: models.Placement, folder: Path, memory: list[int]
) -> dict[str, Any]:
    steps = read_metrics(folder)
    tail = steps[-10:]
    return {
        "steps": len(steps),
        "train_loss": sum(step["loss"] for step in tail) / len(tail),
        "tokens": sum(step["tokens"] for step in steps),
        "seconds": sum(step["seconds"] for step in steps),
        "input_wait_seconds": sum(step["input_wait_seconds"] for step in steps),
        "device": str(placement),
        "processes": len(memory),
        "peak_memory_bytes": max(memory),
        "peak_memory_bytes_by_rank": memory,
        "out_of_memory": Pieces(folder / OUT_OF_MEMORY, device=str(placement)).events,
        "lora_layers": len(models.lora_names(model)),
        "four_bit_layers": sum(map(models.is_four_bit, models.linear_names(model).values())),
        "versions": versions(),
    }
