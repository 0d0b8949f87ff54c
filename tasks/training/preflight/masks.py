"""Checks (a) and (b): the loss covers what is to be learned and nothing else, and training asks as evaluation will."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from tasks.training.collate import IGNORED, LossMaskError
from tasks.training.conversations import check_loss
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.setup import Row, Setup
from tasks.training.template import render_prompt

MASK, PROMPT = "loss mask", "prompt"
WANTED_MASK = "the completion and its stop token in the loss; no image, pad, prompt or system token"
WANTED_PROMPT = "the prompt that answers are generated from, token by token"


@dataclass(frozen=True)
class Span:
    """A stretch of a sample as the model sees it, and whether the loss covers it."""

    sample_id: str
    text: str
    supervised: bool


def check_mask(setup: Setup) -> list[Finding]:
    """Look at the labels of the checked rows, one by one and as one batch."""
    rows = setup.rows()
    faulty = [finding for row in rows if (finding := _mask_fault(setup, row))]
    if faulty:
        return faulty
    alone = [_supervised(setup.collator([dict(row)]))[0] for row in rows]
    together = _supervised(setup.collator([dict(row) for row in rows]))
    wrong = [row["sample_id"] for row, one, many in zip(rows, alone, together, strict=True) if one != many]
    counts = sorted(map(len, alone))
    return [
        Finding.judge(
            MASK,
            f"{len(rows)} samples",
            not wrong,
            measured=f"other tokens are in the loss beside other samples than alone: {', '.join(wrong)}"
            if wrong
            else f"{counts[0]} to {counts[-1]} tokens a sample are in the loss, alone as in a batch",
            wanted=WANTED_MASK,
            remedy="Padding reaches the labels: give the processor a pad token of its own, and report the model.",
        )
    ]


def check_prompt(setup: Setup) -> list[Finding]:
    """Compare what stands before the first supervised token with the prompt rendered for generation."""
    rows = setup.rows()
    for row in rows:
        trained, asked = _prompts(setup, row)
        if trained != asked:
            at = next((i for i, pair in enumerate(zip(trained, asked, strict=False)) if pair[0] != pair[1]), None)
            begin = max(0, (min(len(trained), len(asked)) if at is None else at) - 4)
            decode = _decoder(setup)
            return [
                Finding(
                    PROMPT,
                    f"sample {row['sample_id']}",
                    "failed",
                    f"from token {begin} trained on {decode(trained[begin:])!r}, asked with {decode(asked[begin:])!r}",
                    WANTED_PROMPT,
                    "Make the chat template write the same before an answer with add_generation_prompt as in training.",
                )
            ]
    return [Finding(PROMPT, f"{len(rows)} samples", "ok", "equal token by token", WANTED_PROMPT)]


def spans(setup: Setup, rows: list[Row]) -> list[Span]:
    """Return the rows as the model sees them, cut where the loss begins and ends; image tokens are only counted."""
    return [span for row in rows for span in _spans(setup, row)]


def _mask_fault(setup: Setup, row: Row) -> Finding | None:
    try:
        check_loss(setup.collator, [row])
    except LossMaskError as error:
        remedy = "Use the model's own chat template, or mend it: what the message names must be in the loss, or not."
        return Finding(MASK, f"sample {row['sample_id']}", "failed", str(error), WANTED_MASK, remedy)
    return None


def _supervised(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The tokens in the loss, by row."""
    return [labels[labels != IGNORED].tolist() for labels in batch["labels"]]


def _prompts(setup: Setup, row: Row) -> tuple[list[int], list[int]]:
    """The tokens before the first one in the loss, and those of the prompt as it is rendered for generation."""
    batch = setup.collator([dict(row)])
    ids, covered = batch["input_ids"][0], batch["labels"][0] != IGNORED
    first = int(covered.nonzero()[0]) if covered.any() else len(ids)
    processor: Any = setup.processor
    if "messages" in row:
        before = row["messages"][: next(i for i, m in enumerate(row["messages"]) if m["role"] == "assistant")]
        text = processor.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
        images = row["images"][: sum(part["type"] == "image" for message in before for part in message["content"])]
    else:
        text, images = render_prompt(processor, row), row["images"]
    asked = processor(images=[images], text=[text], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    return ids[:first].tolist(), asked.tolist()


def _spans(setup: Setup, row: Row) -> Iterator[Span]:
    batch = setup.collator([dict(row)])
    decode, image = _decoder(setup), getattr(setup.processor, "image_token_id", None)
    pairs = zip(batch["input_ids"][0].tolist(), (batch["labels"][0] != IGNORED).tolist(), strict=True)
    for supervised, tokens in groupby(pairs, key=lambda pair: pair[1]):
        text = ""
        for is_image, run in groupby((token for token, _ in tokens), key=lambda token: token == image):
            ids = list(run)
            text += f"[{len(ids)} image tokens]" if is_image else decode(ids)
        yield Span(row["sample_id"], text, supervised)


def _decoder(setup: Setup) -> Any:
    tokenizer: Any = setup.processor.tokenizer  # type: ignore[attr-defined]
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
