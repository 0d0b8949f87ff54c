"""Makes batches whose loss covers the completion and its stop token, and proves it on real rows before training.

TRL's collator does the rendering; what a chat template writes after the stop token is never generated, so it is masked.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from tasks.training.dataset import text_of
from tasks.training.families import placeholder_ids
from tasks.training.template import render_prompt
from tasks.training.turns import turns_fault

IGNORED = -100


class LossMaskError(RuntimeError):
    """The loss would cover what it should not, or miss what it should; the message shows the sample and the tokens."""


@dataclass
class CompletionCollator(DataCollatorForVisionLanguageModeling):
    """TRL's prompt/completion collator with labels that end at the stop token.

    `stop_ids` are the tokens that end generation. Rows are those of `dataset.FEATURES`.
    """

    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        refuse_truncation(self.max_length)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels (rows, tokens) and the processor's image tensors."""
        batch = super().torch_call([dict(example) for example in examples])
        labels = batch["labels"]
        stops = torch.isin(labels, torch.tensor(self.stop_ids))
        stopped_before = stops.cumsum(dim=1) - stops.long() > 0
        batch["labels"] = labels.masked_fill(stopped_before, IGNORED)
        return batch


def refuse_truncation(max_length: int | None) -> None:
    """Raise `LossMaskError` if a collator would cut rows."""
    if max_length is not None:
        raise LossMaskError(
            f"max_length: is {max_length}, which cuts image tokens and stop tokens off long rows. Set it to None, and "
            "leave long samples out by their length."
        )


def check_loss_mask(collator: CompletionCollator, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise `LossMaskError` unless, for each row, the loss covers its completion and one stop token, nothing else.

    What comes before it must be the very prompt that evaluation will generate from.
    """
    for row in rows:
        batch = collator([dict(row)])
        fault = _mask_fault(collator, row, batch)
        if fault:
            covered = _decode(collator.processor, batch["input_ids"][0][batch["labels"][0] != IGNORED])
            raise LossMaskError(
                f"sample {row['sample_id']}: {fault}. Completion: {text_of(row['completion'])!r}; the loss covers "
                f"{covered!r}. Check the base model's chat template and generation_config."
            )


def _mask_fault(collator: CompletionCollator, row: Mapping[str, Any], batch: Mapping[str, torch.Tensor]) -> str | None:
    processor: Any = collator.processor
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    covered = labels != IGNORED
    if not covered.any():
        return "no token is in the loss"
    if (ids[covered] != labels[covered]).any():
        return "labels differ from the tokens they stand at"
    special = {processor.tokenizer.pad_token_id, *placeholder_ids(processor)} - set(collator.stop_ids)
    if special & set(labels[covered].tolist()):
        return "an image or pad token is in the loss"
    if int(labels[covered][-1]) not in collator.stop_ids:
        return "the loss does not end with a token that ends generation, so answers would go on for ever"
    if _decode(processor, labels[covered][:-1]).strip() != text_of(row["completion"]).strip():
        return "the loss covers something else than the completion"
    prompt = processor(
        images=[row["images"]], text=[render_prompt(processor, row)], add_special_tokens=False, return_tensors="pt"
    )["input_ids"][0]
    first = int(covered.nonzero()[0])
    if ids[:first].tolist() != prompt.tolist():
        return "the prompt trained on differs from the prompt that answers are generated from"
    texts = [text_of(row["prompt"]), text_of(row["completion"])]
    return turns_fault(processor, ids.tolist(), covered.tolist(), texts=texts, stop_ids=collator.stop_ids)


def _decode(processor: Any, ids: torch.Tensor) -> str:
    return str(processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
