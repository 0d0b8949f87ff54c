"""Check (j), on the training's own rows: too long for the model, images that can't be read, answers all alike."""

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import Image, List
from PIL import Image as Pictures

from tasks.training.dataset import text_of
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.setup import Row, Setup
from tasks.training.template import render_prompt

LENGTH, READABLE, ANSWERS = "length", "readable images", "answers"
BATCH = 256
DECODED = 64
"""Images decoded in full, evenly spread; of all others only the header is read, as curation has decoded them before."""
MOST_COMMON = 3
NEARLY_ALL = 0.9
"""Share of a single answer that deserves a word."""
NAMED = 5
"""Most samples that a finding names."""


def check_data(setup: Setup) -> list[Finding]:
    """Look at every row once: how long it may become, whether its images can be read, and what it answers."""
    plain = setup.examples.cast_column("images", List(Image(decode=False)))
    limit = _context(setup)
    decoded_every = max(1, len(plain) // DECODED)
    sizes: Counter[tuple[int, int]] = Counter()
    answers: Counter[str] = Counter()
    broken: list[str] = []
    suspects: list[int] = []  # rows that may be longer than the model's context
    longest = 0
    for at, row in enumerate(_rows(plain)):
        found = [_size(image, decode=at % decoded_every == 0) for image in row["images"]]
        answers.update(_answers(row))
        if not found or None in found:
            broken.append(row["sample_id"])
            continue
        known = [size for size in found if size]
        sizes.update(known)
        bound = len(_text(setup, row).encode()) + sum(_image_tokens(setup, size) for size in known)
        longest = max(longest, bound)
        if limit is not None and bound > limit:
            suspects.append(at)
    too_long = {at: length for at in suspects if (length := _length(setup, at)) > (limit or 0)}
    return [
        _length_finding(setup, too_long, limit, longest),
        _image_finding(len(plain), broken, sum(sizes.values())),
        _answer_finding(answers),
    ]


def _rows(plain: Any) -> Iterator[Row]:
    for batch in plain.iter(batch_size=BATCH):
        for at in range(len(batch["sample_id"])):
            yield {name: values[at] for name, values in batch.items()}


def _size(image: dict[str, Any] | None, *, decode: bool) -> tuple[int, int] | None:
    """Width and height by the file's header, or None if it can't be read."""
    if not image or not image["bytes"]:
        return None
    try:
        with Pictures.open(io.BytesIO(image["bytes"])) as picture:
            if decode:
                picture.load()
            return picture.size
    except (OSError, ValueError, SyntaxError, Pictures.DecompressionBombError):
        return None


def _answers(row: Row) -> list[str]:
    if "messages" in row:
        return [part["text"] for m in row["messages"] if m["role"] == "assistant" for part in m["content"]]
    return [text_of(row["completion"])]


def _text(setup: Setup, row: Row) -> str:
    if "messages" in row:
        processor: Any = setup.processor
        return str(processor.apply_chat_template(row["messages"], tokenize=False))
    return render_prompt(setup.processor, row) + text_of(row["completion"])


def _image_tokens(setup: Setup, size: tuple[int, int]) -> int:
    """Tokens that the processor makes of an image of this size, without decoding it."""
    processor: Any = setup.processor
    [count] = processor._get_num_multimodal_tokens(image_sizes=[(size[1], size[0])])["num_image_tokens"]
    return int(count)


def _length(setup: Setup, at: int) -> int:
    """Tokens of a row as the collator makes them."""
    return int(setup.collator([dict(setup.examples[at])])["input_ids"].shape[1])


def _context(setup: Setup) -> int | None:
    return getattr(setup.base.config.get_text_config(), "max_position_embeddings", None)


def _length_finding(setup: Setup, too_long: dict[int, int], limit: int | None, longest: int) -> Finding:
    count = len(setup.examples)
    if too_long:
        named = ", ".join(f"{setup.examples[at]['sample_id']} ({too_long[at]})" for at in list(too_long)[:NAMED])
        measured = f"{len(too_long)} are longer, such as {named} tokens"
    else:
        measured = f"none is longer: at most {longest} tokens, a token for every byte of text"
    wanted = f"at most {limit} tokens, the model's context" if limit else "any length: the model states no limit"
    remedy = "Leave them out with a condition in the policy, shorten their texts, or set a lower max_image_tokens."
    return Finding.judge(LENGTH, f"{count} samples", not too_long, measured=measured, wanted=wanted, remedy=remedy)


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
