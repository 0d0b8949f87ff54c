"""Counts the tokens of every example before training: text by the tokenizer, images by their size, none decoded.

Batches are built on these counts, so they are proved on real rows against what the collator makes of them.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image as Pictures
from PIL.ExifTags import Base
from torch.utils.data import DataLoader
from transformers import ProcessorMixin
from trl.data_utils import apply_chat_template, prepare_multimodal_messages

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

CHECKED_ROWS = 8
BATCH_ROWS = 128


class LengthError(RuntimeError):
    """The tokens of examples can't be counted without computing them; the message says for which processor."""


def count_tokens(rows: Dataset, processor: ProcessorMixin, collator: Collator, *, workers: int = 0) -> np.ndarray:
    """Return the tokens of each row as `collator` makes them, images included, (rows,) int64.

    Rows are those of `dataset.FEATURES` or `documents.FEATURES`. Only the headers of images are read, by `workers`
    processes (0: this one). Raises `LengthError` if the processor does not say how many tokens an image becomes, or if
    a count is wrong for one of the first rows.
    """
    starts: Any = range(0, len(rows), BATCH_ROWS)
    count = partial(_count_from, rows=rows.with_format("arrow"), processor=processor)
    parts = list(DataLoader(starts, batch_size=None, num_workers=workers, collate_fn=count))
    counted, images = (np.concatenate(part) for part in zip(*parts, strict=True))
    checked = list(islice(rows, CHECKED_ROWS))
    made = np.array([collator([dict(row)])["input_ids"].shape[1] for row in checked])
    beside = _beside(made - counted[: len(made)], images[: len(made)], checked, processor)
    return np.asarray(counted + images * beside)


def _count_from(start: int, *, rows: Dataset, processor: ProcessorMixin) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and images of the rows from `start` on."""
    batch = rows[start : start + BATCH_ROWS].to_pydict()
    return _count(batch, processor), np.array([len(images) for images in batch["images"]])


def _count(batch: Mapping[str, Sequence[Any]], processor: Any) -> np.ndarray:
    """Tokens of text and images, placeholders for images counted as text."""
    texts, owners = [], []
    for at, text in _rendered(batch, processor):
        texts.append(text)
        owners.append(at)
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    counts = np.bincount(owners, weights=[len(row) for row in ids], minlength=len(batch["images"])).astype(np.int64)
    sizes = [image_size(image["bytes"])[::-1] for images in batch["images"] for image in images]
    owners = [at for at, images in enumerate(batch["images"]) for _ in images]
    if sizes:
        counts += np.bincount(owners, weights=image_tokens(processor, sizes), minlength=len(counts)).astype(np.int64)
    return counts


def _rendered(batch: Mapping[str, Sequence[Any]], processor: Any) -> Iterator[tuple[int, str]]:
    """The texts that the collator has tokenized, with the row they are of: TRL renders both the same way."""
    for at, images in enumerate(batch["images"]):
        if "messages" in batch:
            yield at, processor.apply_chat_template(batch["messages"][at], tokenize=False)
        else:
            prompt = prepare_multimodal_messages(batch["prompt"][at], images=images)
            completion = prepare_multimodal_messages(batch["completion"][at])
            row = apply_chat_template({"prompt": prompt, "completion": completion}, processor)
            yield at, row["prompt"]
            yield at, row["completion"]


def image_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return how many tokens images of these (height, width) become, by the processor's own rule.

    Raises `LengthError` if it has none.
    """
    rule = getattr(processor, "_get_num_multimodal_tokens", None)
    if rule is None:
        raise LengthError(
            f"{type(processor).__name__} does not say how many tokens an image becomes, so batches can't be built by "
            "tokens. Leave tokens_per_batch empty."
        )
    tokens: list[int] = rule(image_sizes=[list(size) for size in sizes])["num_image_tokens"]
    return tokens


def image_size(data: bytes) -> tuple[int, int]:
    """Return an image's (width, height) as it is shown, from its header: cameras may store it lying on its side."""
    with Pictures.open(io.BytesIO(data)) as picture:
        turned = picture.getexif().get(Base.Orientation, 1) >= 5
        return (picture.height, picture.width) if turned else picture.size


def _beside(missing: np.ndarray, images: np.ndarray, rows: Sequence[Mapping[str, Any]], processor: Any) -> int:
    """Tokens that each image brings beside its own, less its placeholder; raises `LengthError` unless that is all."""
    beside = int(missing[images > 0][0] // images[images > 0][0]) if images.any() else 0
    if (wrong := np.flatnonzero(missing != images * beside)).size:
        sample = rows[int(wrong[0])]["sample_id"]
        more = missing[wrong[0]] - images[wrong[0]] * beside
        raise LengthError(
            f"sample {sample}: {type(processor).__name__} makes it {more:+d} tokens longer than counted, so batches "
            "can't be built by tokens. Leave tokens_per_batch empty."
        )
    return beside
