"""The merging process: folds an adapter into its base model, saves the result, and compares what both say.

A 4-bit base is dequantized first: adding the adapter to 4-bit weights would round its small changes away, and adding
it to the original weights gives another function than the one that was trained and evaluated.
"""

import gc
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tasks.training import model as models
from tasks.training.collate import IGNORED, CompletionCollator
from tasks.training.conversations import ConversationCollator, make_collator
from tasks.training.dataset import read_examples
from tasks.training.recipe import Recipe
from tasks.training.template import stop_ids

log = logging.getLogger(__name__)


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Merge, leave the model in `folder/model`, and return how far it is from the adapter on its base.

    `config` holds recipe, model (folder), adapter (folder), examples (file) and limit. The distance is measured on the
    merged model as loaded from `folder/model`.
    """
    recipe = Recipe.model_validate(config["recipe"])
    placement = models.place(recipe)
    processor = models.load_processor(config["model"], recipe)
    examples = read_examples(Path(config["examples"]), limit=config["limit"])

    merged = merge(models.load_model(config["model"], placement), config["adapter"])
    stops = stop_ids(merged)
    merged.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    del merged
    _free_memory()

    collator = make_collator(processor, examples, stops)
    adapted = models.load_adapter(models.load_model(config["model"], placement), config["adapter"])
    before = completion_logits(adapted, collator, examples, placement)
    del adapted
    _free_memory()

    reloaded = models.load_model(folder / "model", replace(placement, four_bit=False))
    after = completion_logits(reloaded, collator, examples, placement)
    method = "dequantize, then merge" if placement.four_bit else "merge"
    return {"method": f"{method} in {str(placement.dtype).removeprefix('torch.')}", **compare(before, after)}


def _free_memory() -> None:
    """A 31B model, its merged self and its 4-bit self don't fit one GPU together."""
    gc.collect()
    torch.cuda.empty_cache()


def merge(base: PreTrainedModel, adapter: str | Path) -> PreTrainedModel:
    """Return `base` with the adapter folded into its weights, which are no longer 4-bit if they were."""
    if getattr(base, "is_loaded_in_4bit", False):
        base = base.dequantize()
    adapted = models.load_adapter(base, adapter)
    if not isinstance(adapted, PeftModel):  # weights trained in full took the place of the base model's
        return adapted
    log.info("merging %d layers", len(models.lora_names(adapted)))
    merged = adapted.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    return merged


@torch.inference_mode()
def completion_logits(
    model: PreTrainedModel | PeftModel,
    collator: CompletionCollator | ConversationCollator,
    examples: Dataset,
    placement: models.Placement,
) -> list[Tensor]:
    """Return, for each example, the float32 logits (completion tokens, vocabulary) that predict its completion."""
    model.eval()
    found = []
    for row in examples:
        batch = collator([row])
        predicts = batch.pop("labels")[0, 1:] != IGNORED
        inputs = {
            name: value.to(placement.device, placement.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }
        logits = model(**inputs).logits[0, :-1]
        found.append(logits[predicts.to(logits.device)].float().cpu())
    return found


def compare(before: list[Tensor], after: list[Tensor]) -> dict[str, float | int]:
    """Return mean KL(before ‖ after) in nats, largest logit difference and share of equal top tokens, over all rows."""
    divergence = difference = same = 0.0
    tokens = 0
    for expected, found in zip(before, after, strict=True):
        p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        difference = max(difference, float((expected - found).abs().max()))
        same += float((expected.argmax(-1) == found.argmax(-1)).sum())
        tokens += len(expected)
    return {
        "kl_per_token": divergence / tokens,
        "max_logit_difference": difference,
        "agreement": same / tokens,
        "tokens": tokens,
    }
