"""Makes batches of conversations whose loss covers all that the assistant says, and proves it on real rows.

TRL's collator does the rendering; the chat template must mark what the assistant says.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from tasks.training.collate import (
    IGNORED,
    CompletionCollator,
    LossMaskError,
    check_loss_mask,
    refuse_truncation,
)
from tasks.training.template import marked_template
from tasks.training.turns import turns_fault


@dataclass
class ConversationCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator of conversations with the loss on the assistant's turns, each up to its stop token.

    `stop_ids` are the tokens that end generation, `chat_template` one that marks what the assistant says. Rows are
    those of `documents.FEATURES`.
    """

    stop_ids: tuple[int, ...] = ()
    assistant_only_loss: bool = True

    def __post_init__(self) -> None:
        refuse_truncation(self.max_length)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels (rows, tokens) and the processor's image tensors."""
        batch: dict[str, Any] = super().torch_call([dict(example) for example in examples])
        batch["labels"] = _end_turns(batch["labels"], self.stop_ids)
        return batch


def _end_turns(labels: torch.Tensor, stop_ids: tuple[int, ...]) -> torch.Tensor:
    """Mask what a template marks behind the stop token of a turn, such as a line's end: it is never generated."""
    covered = labels != IGNORED
    stops = torch.isin(labels, torch.tensor(stop_ids)).long()
    before = stops.cumsum(dim=1) - stops
    starts = covered & ~torch.nn.functional.pad(covered, (1, -1))
    before_turn = torch.where(starts, before, 0).cummax(dim=1).values
    return labels.masked_fill(before > before_turn, IGNORED)


def make_collator(
    processor: ProcessorMixin, rows: Dataset, stop_ids: tuple[int, ...]
) -> CompletionCollator | ConversationCollator:
    """Return the collator that suits the rows: of conversations, or of prompts and completions.

    Raises `TemplateError` if conversations can't be masked, because no template marks what the assistant says.
    """
    if "messages" in rows.column_names:
        return ConversationCollator(processor, stop_ids=stop_ids, chat_template=marked_template(processor))
    return CompletionCollator(processor, completion_only_loss=True, stop_ids=stop_ids)


def check_loss(collator: CompletionCollator | ConversationCollator, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise `LossMaskError` unless, for each row, the loss covers what is to be learned and nothing else.

    That is the completion and its stop token (see `check_loss_mask`), or each turn of the assistant and its own.
    """
    if isinstance(collator, CompletionCollator):
        check_loss_mask(collator, rows)
        return
    for row in rows:
        batch = collator([dict(row)])
        if fault := _fault(collator, row, batch["input_ids"][0], batch["labels"][0]):
            raise LossMaskError(
                f"document {row['sample_id']}: {fault}. Give a base model whose chat template puts what the assistant "
                "says, its stop token included, between {% generation %} and {% endgeneration %}."
            )


def _fault(
    collator: ConversationCollator, row: Mapping[str, Any], ids: torch.Tensor, labels: torch.Tensor
) -> str | None:
    processor: Any = collator.processor
    covered = labels != IGNORED
    if not covered.any():
        return "no token is in the loss"
    if (ids[covered] != labels[covered]).any():
        return "labels differ from the tokens they stand at"
    starts = torch.nonzero(covered & ~torch.cat([torch.tensor([False]), covered[:-1]])).flatten().tolist()
    turns = [labels[start:][: int((~covered[start:]).long().cumsum(0).eq(0).sum())] for start in starts]
    said = [m["content"][0]["text"] for m in row["messages"] if m["role"] == "assistant"]
    if len(turns) != len(said):
        return f"the loss covers {len(turns)} stretches, and the assistant has {len(said)} turns"
    for turn, text in zip(turns, said, strict=True):
        if int(turn[-1]) not in collator.stop_ids:
            return f"the loss does not end with a stop token after {text!r}"
        found = processor.tokenizer.decode(turn[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if found.strip() != text.strip():
            return f"the loss covers {found!r} where {text!r} is said"
    texts = [part["text"] for m in row["messages"] for part in m["content"] if part["type"] == "text"]
    return turns_fault(processor, ids.tolist(), covered.tolist(), texts=texts, stop_ids=collator.stop_ids)
