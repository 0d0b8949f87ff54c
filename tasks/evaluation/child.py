"""The evaluation process: lets the model, with or without an adapter, answer prompts and writes what it said."""

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from tasks.training import model as models
from tasks.training.dataset import read_examples, text_of
from tasks.training.recipe import Recipe
from tasks.training.template import render_prompt, stop_ids

log = logging.getLogger(__name__)

ANSWERS = "answers.parquet"
PROGRESS_SECONDS = 5.0


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Answer the examples' prompts greedily and leave `answers.parquet` in `folder`.

    `config` holds recipe, model (folder), adapter (folder or null), examples (file) and limit (or null). The table has
    sample_id, prompt, expected, answer and stopped, in the examples' order.
    """
    recipe = Recipe.model_validate(config["recipe"])
    placement = models.place(recipe)
    processor = models.load_processor(config["model"], recipe)
    base = models.load_model(config["model"], placement)
    model = models.load_adapter(base, config["adapter"]) if config["adapter"] else base
    model.eval()
    examples = read_examples(Path(config["examples"]), limit=config["limit"])

    log.info("%d prompts for %s", len(examples), "base model and adapter" if config["adapter"] else "the base model")
    stops, longest = stop_ids(base), recipe.max_new_tokens
    rows: list[dict[str, Any]] = []
    started = printed = time.monotonic()
    for start in range(0, len(examples), recipe.answer_batch_size):
        batch = examples.select(range(start, min(start + recipe.answer_batch_size, len(examples))))
        rows += answer(model, processor, batch, placement=placement, stops=stops, max_new_tokens=longest)
        if time.monotonic() - printed >= PROGRESS_SECONDS or len(rows) == len(examples):
            printed = time.monotonic()
            log.info("%d of %d answered, %.1f a second", len(rows), len(examples), len(rows) / (printed - started))
    pq.write_table(pa.Table.from_pylist(rows), folder / ANSWERS)
    return {"answers": len(rows)}


@torch.inference_mode()
def answer(
    model: PreTrainedModel | PeftModel,
    processor: ProcessorMixin,
    examples: Dataset,
    *,
    placement: models.Placement,
    stops: tuple[int, ...],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Return the model's greedy answers to a batch of examples; `stopped` is false where the length ended one."""
    prompts = [render_prompt(processor, row) for row in examples]
    inputs = processor(
        images=[row["images"] for row in examples],
        text=prompts,
        padding=True,
        padding_side="left",
        add_special_tokens=False,  # the chat template wrote them
        return_tensors="pt",
    ).to(placement.device, placement.dtype)
    generate: Any = model.generate
    tokens = generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None
    )
    tokens = tokens[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    stopped = torch.isin(tokens, torch.tensor(stops, device=tokens.device)).any(dim=1).tolist()
    return [
        {
            "sample_id": row["sample_id"],
            "prompt": prompt,
            "expected": text_of(row["completion"]),
            "answer": text,
            "stopped": ended,
        }
        for row, prompt, text, ended in zip(examples, prompts, texts, stopped, strict=True)
    ]
