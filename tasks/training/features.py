"""Keeps what a frozen vision tower makes of each image, so that it is computed once and not once an epoch.

The features lie in one file, memory-mapped, in the model's own precision; a batch carries them in place of pixels.
"""

import inspect
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from tasks.training.families import decoder_name, without_adapter
from tasks.training.ranks import world_size
from tasks.training.recipe import Recipe

log = logging.getLogger(__name__)

Row = dict[str, Any]
Batch = dict[str, Any]
Collator = Callable[[list[Row]], Batch]

PIXELS, FEATURES = "pixel_values", "image_features"
DEEP_FEATURES = "deepstack_features"
INDEX, DATA = "features.json", "features.bin"
MOST_OF_THE_DISK = 0.5
PAYS_AFTER_EPOCHS = 2


class NotCacheable(RuntimeError):  # noqa: N818 - says what is the matter
    """A model's image features can't stand in for its images; the message says why."""


@dataclass(frozen=True)
class FeatureCache:
    """The features of each sample's images: `spans[sample_id]` are its first row and number of rows in `data`.

    `data` is (image tokens of all samples, width of the language model), as the bytes of `dtype`. The model's own are
    a tensor for all images, or `in_tuple` one for each.
    """

    data: np.ndarray[Any, Any]
    dtype: torch.dtype
    in_tuple: bool
    spans: Mapping[str, tuple[int, int]]

    def of(self, sample_ids: Iterable[str]) -> Tensor | None:
        """Return the features of these samples, one after the other, or None if one of them is not here."""
        spans = [self.spans.get(sample_id) for sample_id in sample_ids]
        if not spans or None in spans:
            return None
        rows = [self.data[start : start + count] for start, count in filter(None, spans)]
        return torch.from_numpy(np.concatenate(rows)).view(self.dtype)


@dataclass(frozen=True)
class FeatureCollator:
    """Gives `collator`'s batches with the cached features in place of the pixels, if each of their rows has them."""

    collator: Collator
    cache: FeatureCache

    def __call__(self, rows: list[Row]) -> Batch:
        """Return the batch, with `image_features` (image tokens, width) and without `pixel_values` where possible."""
        batch = self.collator(rows)
        features = self.cache.of(row["sample_id"] for row in rows)
        if features is not None:
            del batch[PIXELS]
            batch[FEATURES] = features
        return batch


class FeatureInput:
    """Lets a model take `image_features` where it would take `pixel_values`; `remove` undoes it."""

    def __init__(self, model: Any, *, in_tuple: bool = True) -> None:
        self._inner = model.base_model
        self._compute: Callable[..., Any] = self._inner.get_image_features
        self._given: Tensor | None = None
        self.in_tuple = in_tuple
        self._hook = self._inner.register_forward_pre_hook(self._take, with_kwargs=True)
        self._inner.get_image_features = self._answer

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()
        del self._inner.get_image_features

    def compute(self, batch: Batch) -> Tensor:
        """Return the features of a batch's images, one after the other: (image tokens, width).

        Raises `NotCacheable` if the model takes more of its images than that.
        """
        names = inspect.signature(self._compute).parameters
        output = self._compute(**{name: value for name, value in batch.items() if name in names})
        if getattr(output, DEEP_FEATURES, None):
            raise NotCacheable("the language model takes features from inside the vision tower too")
        pooled = output.pooler_output
        self.in_tuple = not isinstance(pooled, Tensor)
        parts = list(pooled)
        return torch.cat(parts).flatten(0, -2)

    def _take(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._given = kwargs.pop(FEATURES, None)
        if self._given is not None:
            kwargs[PIXELS] = self._given
        return args, kwargs

    def _answer(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._given is None or pixel_values is not self._given:
            return self._compute(pixel_values, *args, **kwargs)
        return _Pooled((self._given,) if self.in_tuple else self._given)


@dataclass(frozen=True)
class _Pooled:
    """As much of a vision tower's output as a model reads."""

    pooler_output: tuple[Tensor, ...] | Tensor


def with_features(
    collator: Collator,
    model: PeftModel | PreTrainedModel,
    rows: Any,
    recipe: Recipe,
    *,
    epochs: float,
    folder: Path,
    workers: int = 0,
) -> Collator:
    """Return `collator`, giving features in place of images if the recipe wants that and the model allows it.

    From then on `model` takes such batches. `workers` processes prepare the images. Says in the log what was decided,
    and why.
    """
    base = without_adapter(model)
    outside = [w for name, w in base.named_parameters() if not name.startswith(decoder_name(base) + ".")]
    if any(weight.requires_grad for weight in outside):
        return collator
    wanted = epochs >= PAYS_AFTER_EPOCHS if recipe.cache_vision_features is None else recipe.cache_vision_features
    if not wanted:
        return collator
    if world_size() > 1:
        log.info("images are computed anew each time: %d processes would write the same features", world_size())
        return collator
    started = time.monotonic()
    try:
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            cache = cache_features(base, rows, collator, folder=folder, batch_size=recipe.batch_size, workers=workers)
    except NotCacheable as error:
        log.info("images are computed anew each time: %s", error)
        return collator
    log.info(
        "image features of %d samples in %.0f s, %.2f GiB",
        *(len(cache.spans), time.monotonic() - started, cache.data.nbytes / 2**30),
    )
    FeatureInput(base, in_tuple=cache.in_tuple)
    return FeatureCollator(collator, cache)


def cache_features(
    model: PreTrainedModel, rows: Any, collator: Collator, *, folder: Path, batch_size: int, workers: int
) -> FeatureCache:
    """Compute the image features of all rows (a map-style dataset with `sample_id`), or read them if `folder` has them.

    Raises `NotCacheable` if the model's output with them is not what it is with the images, or if they would take more
    than half of the free disk.
    """
    if (folder / INDEX).exists():
        return _read(folder)
    source = FeatureInput(model)
    try:
        _check(model, source, collator([rows[0]]), disk=shutil.disk_usage(folder).free, rows=len(rows))
        spans: dict[str, tuple[int, int]] = {}
        tokens = 0
        dtype, width = torch.float32, 0
        loader = DataLoader(
            rows, batch_size=batch_size, num_workers=workers, collate_fn=lambda rows: (rows, collator(rows))
        )
        with (folder / DATA).open("wb") as file, torch.no_grad():
            for batch_rows, batch in loader:
                features = source.compute(_on(batch, model.device))
                counts = _image_tokens(model, batch)
                for row, count in zip(batch_rows, counts, strict=True):
                    spans[row["sample_id"]] = (tokens, count)
                    tokens += count
                dtype, width = features.dtype, features.shape[-1]
                file.write(features.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    finally:
        source.remove()
    kind = str(dtype).removeprefix("torch.")
    index = {"dtype": kind, "width": width, "in_tuple": source.in_tuple, "spans": spans}
    unfinished = folder / f"{INDEX}.unfinished"
    unfinished.write_text(json.dumps(index))
    unfinished.replace(folder / INDEX)
    return _read(folder)


def _read(folder: Path) -> FeatureCache:
    index = json.loads((folder / INDEX).read_text())
    dtype: torch.dtype = getattr(torch, index["dtype"])
    width = index["width"] * dtype.itemsize
    data = np.memmap(folder / DATA, dtype=np.uint8, mode="r").reshape(-1, width)
    spans = {name: (start, count) for name, (start, count) in index["spans"].items()}
    return FeatureCache(data, dtype, index["in_tuple"], spans)


def _image_tokens(model: PreTrainedModel, batch: Batch) -> list[int]:
    ids = batch["input_ids"]
    counts: list[int] = (ids == model.config.image_token_id).sum(dim=1).tolist()
    return counts


def _check(model: PreTrainedModel, source: FeatureInput, batch: Batch, *, disk: int, rows: int) -> None:
    batch = {name: value for name, value in _on(batch, model.device).items() if name != "labels"}
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            features = source.compute(batch)
            wanted = model.base_model(**batch).last_hidden_state
            cached = {name: value for name, value in batch.items() if name != PIXELS}
            found = model.base_model(**cached, **{FEATURES: features}).last_hidden_state
    finally:
        model.train(training)
    if not torch.equal(wanted, found):
        raise NotCacheable(
            f"{type(model).__name__} computes something else from cached image features than from images"
        )
    needed = rows * features.numel() * features.element_size()
    if needed > disk * MOST_OF_THE_DISK:
        raise NotCacheable(f"the image features would take {needed / 2**30:.1f} of {disk / 2**30:.1f} GiB free disk")


def _on(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
