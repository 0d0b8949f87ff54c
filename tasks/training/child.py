"""The training process: loads the base model, adds LoRA, trains with TRL and leaves the adapter in a folder.

It needs no warehouse: the examples come as a file, the results go into the folder it is given.
"""

import logging
import math
import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, ProcessorMixin, set_seed
from trl.trainer.sft_config import SFTConfig

from storage.fingerprint import fingerprint
from tasks.training import distributed
from tasks.training import model as models
from tasks.training.checkpoints import MarkComplete, checkpoints_folder, last_complete_checkpoint
from tasks.training.child_side import Stopped
from tasks.training.conversations import check_loss, make_collator
from tasks.training.dataset import read_examples
from tasks.training.divergence import Diverged, remember, versions
from tasks.training.interruption import StopWhenAsked
from tasks.training.metrics import KeepMetrics, peak_memory, read_metrics
from tasks.training.order import Order
from tasks.training.out_of_memory import OUT_OF_MEMORY, REMEDY, OutOfMemory, Pieces, is_out_of_memory
from tasks.training.ranks import is_first, world_size
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids
from tasks.training.trainer import Trainer

log = logging.getLogger(__name__)

CHECKED_ROWS = 8


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Train, going on from the last complete checkpoint in `folder` if there is one.

    `config` holds recipe, model (folder), examples (file) and parent_adapter (folder or null). Leaves `adapter/` and
    what `train_model` does in `folder`; returns what the run's record needs. Raises what `train_model` does. Several
    processes share the training when the environment says so (see `distributed`); the first of them writes.
    """
    recipe = Recipe.model_validate(config["recipe"])
    placement = models.place(recipe)
    processor = models.load_processor(config["model"], recipe)
    base = models.load_model(config["model"], placement)
    set_seed(recipe.seed)  # LoRA's initial weights are random
    model = _adapted(base, recipe, config["parent_adapter"])
    lora_weights = _trainable(model)
    log.info("LoRA on %d linear layers, %.2f M weights", len(models.lora_names(model)), lora_weights / 1e6)
    examples = read_examples(Path(config["examples"]))
    train_model(model, processor, examples, recipe, placement, folder)
    _save(model, folder / "adapter")
    memory = distributed.of_all(peak_memory())
    distributed.leave()
    return _result(model, processor, placement, folder, memory) | {"lora_weights": lora_weights}


def _save(model: PeftModel, folder: Path) -> None:
    weights = distributed.whole_weights(model)
    if is_first():
        model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an unfilled form; the run's table says more


def train_model(
    model: PeftModel | PreTrainedModel,
    processor: ProcessorMixin,
    examples: Dataset,
    recipe: Recipe,
    placement: models.Placement,
    folder: Path,
) -> None:
    """Train `model` in place, going on from the last complete checkpoint in `folder` if there is one.

    `examples` are rows of `dataset.FEATURES` or `documents.FEATURES`. Leaves `checkpoints/`, `metrics.jsonl` and
    `tensorboard/` in `folder`. Raises `LossMaskError` before the first step if the loss would cover what it should not,
    `OutOfMemory` if a single sample does not fit, `Diverged` at a loss that is not finite, and `Stopped` when SIGTERM
    ended it early, with a checkpoint.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    collator = make_collator(processor, examples, stop_ids(base))
    check_loss(collator, islice(examples, CHECKED_ROWS))
    per_step = recipe.batch_size * recipe.accumulation
    order = Order(len(examples), steps=count_steps(len(examples), recipe), per_step=per_step, seed=recipe.seed)
    stop = StopWhenAsked()
    trainer = Trainer(
        model=model,
        args=_arguments(base, len(examples), recipe, placement, folder),
        train_dataset=examples,
        processing_class=processor,
        collator=collator,
        order=order,
        pieces=Pieces(folder / OUT_OF_MEMORY, device=str(placement)),
        callbacks=[KeepMetrics(folder, passes=len(order) / len(examples)), stop, MarkComplete()],
    )
    trainer.remove_callback(PrinterCallback)
    for weight in model.parameters():
        if weight.requires_grad:  # TRL casts LoRA on a 4-bit base to bf16
            weight.data = weight.data.to(distributed.trained_dtype(recipe, placement.dtype))
    distributed.prepare(trainer, recipe)
    with stop.listening():
        _train(trainer, folder, recipe)
    done, steps = trainer.state.global_step, trainer.state.max_steps
    if stop.asked and done < steps:
        raise Stopped(f"stopped after step {done} of {steps}; it goes on from there when it is run again")


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
    model: PreTrainedModel, examples: int, recipe: Recipe, placement: models.Placement, folder: Path
) -> SFTConfig:
    on_gpu = placement.device.type == "cuda"
    per_step = recipe.batch_size * recipe.accumulation
    steps = count_steps(examples, recipe)
    log.info("%d examples, %d steps of %d", examples, steps, per_step)
    return SFTConfig(
        output_dir=str(checkpoints_folder(folder, recipe)),
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=distributed.passes_per_process(recipe),
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
        dataloader_num_workers=min(8, (os.cpu_count() or 1) // world_size() - 1) if on_gpu else 0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        save_steps=recipe.save_steps,
        save_total_limit=2,  # the newest may be half-written when the process is killed
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log the last finite loss in place of one that is not
        report_to="none",
        disable_tqdm=True,
        **distributed.trainer_arguments(recipe, model),
    )


def count_steps(examples: int, recipe: Recipe) -> int:
    """Return the optimizer steps that the recipe asks for with so many examples."""
    passes = recipe.epochs * examples / (recipe.batch_size * recipe.accumulation)
    return recipe.max_steps or max(1, math.ceil(passes))


def _adapted(base: PreTrainedModel, recipe: Recipe, parent_adapter: str | None) -> PeftModel:
    if parent_adapter is None:
        return models.add_lora(base, recipe, base_model=recipe.base_model)
    log.info("starting from the parent run's adapter")
    return models.load_adapter(base, parent_adapter, trainable=True)


def _trainable(model: PeftModel) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _result(
    model: PeftModel, processor: ProcessorMixin, placement: models.Placement, folder: Path, memory: list[int]
) -> dict[str, Any]:
    if not is_first():
        return {}
    steps = read_metrics(folder)
    tail = steps[-10:]
    four_bit = sum(map(models.is_four_bit, models.linear_names(model).values()))
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
        "four_bit_layers": four_bit,
        "chat_template_fingerprint": fingerprint(processor.chat_template),
        "versions": versions(),
    }
