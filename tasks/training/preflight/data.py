"""Check (j), on the training's own rows: too long for the model, images that can't be read, answers all alike."""

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Image, List
from PIL import Image as Pictures

from tasks.training.batches import BatchError, TokenBatches
from tasks.training.dataset import text_of
from tasks.training.lengths import LengthError
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.setup import Row, Setup

LENGTH, BATCHES, READABLE, ANSWERS = "length", "batches", "readable images", "answers"
BATCH = 256
DECODED = 64
"""Images decoded in full, evenly spread; of all others only the header is read, as curation has decoded them before."""
MOST_COMMON = 3
NEARLY_ALL = 0.9
"""Share of a single answer that deserves a word."""
NAMED = 5
"""Most samples that a finding names."""


def check_data(setup: Setup) -> list[Finding]:
    """Look at every row once: how long it is, whether its images can be read, and what it answers."""
    plain = setup.examples.cast_column("images", List(Image(decode=False)))
    decoded_every = max(1, len(plain) // DECODED)
    answers: Counter[str] = Counter()
    broken: list[str] = []
    images = 0
    for at, row in enumerate(_rows(plain)):
        readable = [_is_readable(image, decode=at % decoded_every == 0) for image in row["images"]]
        images += len(readable)
        if not readable or not all(readable):
            broken.append(row["sample_id"])
        answers.update(_answers(row))
    lengths = [] if broken else [_length_finding(setup)]
    if setup.recipe.tokens_per_batch and not broken:
        lengths.append(_batch_finding(setup, setup.recipe.tokens_per_batch))
    return [*lengths, _image_finding(len(plain), broken, images), _answer_finding(answers)]


def _rows(plain: Any) -> Iterator[Row]:
    for batch in plain.iter(batch_size=BATCH):
        for at in range(len(batch["sample_id"])):
            yield {name: values[at] for name, values in batch.items()}


def _is_readable(image: dict[str, Any] | None, *, decode: bool) -> bool:
    """Whether the file's header, or all of it, can be read."""
    if not image or not image["bytes"]:
        return False
    try:
        with Pictures.open(io.BytesIO(image["bytes"])) as picture:
            if decode:
                picture.load()
    except (OSError, ValueError, SyntaxError, Pictures.DecompressionBombError):
        return False
    return True


def _answers(row: Row) -> list[str]:
    if "messages" in row:
        return [part["text"] for m in row["messages"] if m["role"] == "assistant" for part in m["content"]]
    return [text_of(row["completion"])]


def _length_finding(setup: Setup) -> Finding:
    limit = getattr(setup.base.config.get_text_config(), "max_position_embeddings", None)
    wanted = f"at most {limit} tokens, the model's context" if limit else "any length: the model states no limit"
    try:
        lengths = setup.lengths
    except LengthError as error:
        return Finding(LENGTH, "samples", "noted", str(error), wanted, "Look at the longest samples yourself.")
    too_long = [int(at) for at in np.flatnonzero(lengths > (limit or np.inf))]
    named = ", ".join(f"{setup.examples[at]['sample_id']} ({lengths[at]})" for at in too_long[:NAMED])
    spread = f"{lengths.min()}-{lengths.max()} tokens, {np.median(lengths):.0f} in the middle"
    return Finding.judge(
        LENGTH,
        f"{len(lengths)} samples",
        not too_long,
        measured=f"{len(too_long)} are longer, such as {named} tokens" if too_long else spread,
        wanted=wanted,
        remedy="Leave them out with a condition in the policy, shorten their texts, or set a lower max_image_tokens.",
    )


def _batch_finding(setup: Setup, tokens: int) -> Finding:
    """Whether batches of so many tokens can be made of the samples."""
    wanted = f"samples that can be counted, none of more than {tokens} tokens with padding"
    try:
        TokenBatches(setup.lengths, setup.examples["sample_id"], tokens=tokens, seed=setup.recipe.seed)
    except (LengthError, BatchError) as error:
        return Finding(BATCHES, "tokens_per_batch", "failed", str(error), wanted, "Do what the message says.")
    return Finding(BATCHES, "tokens_per_batch", "ok", "every sample fits a batch", wanted)


def _image_finding(count: int, broken: list[str], read: int) -> Finding:
    named = ", ".join(broken[:NAMED])
    return Finding.judge(
        READABLE,
        f"{count} samples",
        not broken,
        measured=f"missing or unreadable in {len(broken)}: {named}"
        if broken
        else f"all {read} have a whole header, and a spread of at most {2 * DECODED} was decoded",
        wanted="every image there and readable",
        remedy="Curate the pool again: ingest puts what can't be decoded into quarantine.",
    )


def _answer_finding(answers: Counter[str]) -> Finding:
    """A single answer for everything is learned without looking at an image, so it fails; a frequent one is noted."""
    total = answers.total()
    top = answers.most_common(MOST_COMMON)
    share = top[0][1] / total if top else 0.0
    shown = ", ".join(f"{text[:60]!r} {times / total:.0%}" for text, times in top)
    constant = len(answers) == 1 and total > 1
    return Finding.judge(
        ANSWERS,
        f"{total} completions",
        share <= NEARLY_ALL and not constant,
        measured=f"{len(answers)} different; most common: {shown}",
        wanted=f"more than one, none of them above {NEARLY_ALL:.0%}",
        remedy="All answers are the same: write a completion that differs between images."
        if constant
        else "Always giving the most common answer is right this often: compare exact match with it, or balance the "
        "dataset with a limit in its policy.",
        otherwise="failed" if constant else "noted",
    )
