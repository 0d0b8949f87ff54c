"""How well a caption fits its image, and where both lie in CLIP's space."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels
from tasks.curation.signals.clip_checkpoint import Checkpoint, find_checkpoint
from tasks.curation.signals.contract import Signal

MAX_ASPECT = 50
"""Longer by shorter side above which only the middle of an image is looked at.

open_clip resizes the shorter side and crops then: a banner of 10 x 65,000 pixels would become 224 x 1.4 million.
"""


@dataclass(frozen=True)
class Clip(Signal):
    """CLIP score and embeddings by open_clip, with open_clip's own preprocessing of the image at full size.

    `model` is an architecture, with `pretrained` an open_clip tag or a weights file, or `local-dir:<folder>`. Captions
    are cut at the model's context length. Runs in float32 on a CPU and in bfloat16 on a GPU, where scores differ by up
    to a few thousandths; a decoder that scales JPEGs while decoding would shift them as well, so none is used.
    """

    model: str = "ViT-B-32"
    pretrained: str | None = "openai"
    text_embedding: bool = False

    name = "clip"
    version = 1
    needs = Needs.PIXELS

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The model's files. Raises `MissingWeights` if they can't be found."""
        return find_checkpoint(self.model, self.pretrained)

    @property
    def columns(self) -> pa.Schema:
        """See `Signal.columns`; the length of the embeddings is the model's."""
        embedding = _embedding_type(self.checkpoint.embedding_size)
        columns = [
            column("clip_score", pa.float32(), "cosine of image and caption, -1 to 1; scales differ between models"),
            column("image_embedding", embedding, "L2-normalised; null if the image can't be decoded"),
        ]
        if self.text_embedding:
            columns.append(column("text_embedding", embedding, "L2-normalised; null without a caption"))
        return pa.schema(columns)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`."""
        return {**self.checkpoint.parameters, "max_aspect": MAX_ASPECT}

    def view(self, pixels: Pixels) -> Any:
        """Return open_clip's input, a float32 tensor of shape (3, height, width)."""
        is_cropped = self.checkpoint.preprocessing.get("resize_mode") != "squash"
        return self._model.preprocess(_middle(pixels.image) if is_cropped else pixels.image)

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        size = self.checkpoint.embedding_size
        captions = batch.captions.to_pylist()
        has_image = np.array([view is not None for view in batch.views], np.bool_)
        has_text = np.array([caption is not None for caption in captions], np.bool_)
        images, texts = np.zeros((2, len(batch), size), np.float32)
        if has_image.any():
            images[has_image] = self._model.encode_images([view for view in batch.views if view is not None]).numpy()
        if has_text.any():
            texts[has_text] = self.embed_texts([caption for caption in captions if caption is not None])
        scores = np.einsum("ij,ij->i", images, texts)
        columns = [pa.array(scores, mask=~(has_image & has_text)), _vectors(images, has_image)]
        if self.text_embedding:
            columns.append(_vectors(texts, has_text))
        return pa.record_batch(columns, schema=self.columns)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return L2-normalised embeddings of texts, of shape (texts, embedding size)."""
        embeddings: npt.NDArray[np.float32] = self._model.encode_texts(texts).numpy()
        return embeddings

    @property
    def _model(self) -> Any:
        clip_model = importlib.import_module("tasks.curation.signals.clip_model")  # torch and open_clip take seconds
        return clip_model.load(self.checkpoint)


def stored_embeddings(measured: pa.RecordBatch) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return the image embeddings among a stored table's columns, and which rows have one.

    The embeddings are float32 of shape (rows that have one, embedding size), the mask bool of shape (rows,).
    """
    column = measured.column("image_embedding")
    vectors = column.flatten().to_numpy(zero_copy_only=False)  # skips nulls
    return vectors.astype(np.float32).reshape(-1, column.type.list_size), np.asarray(column.is_valid())


def _vectors(values: npt.NDArray[np.float32], present: npt.NDArray[np.bool_]) -> pa.FixedSizeListArray:
    flat = pa.array(values.astype(np.float16).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, type=_embedding_type(values.shape[1]), mask=pa.array(~present))


def _embedding_type(size: int) -> pa.DataType:
    return pa.list_(pa.field("element", pa.float16()), size)  # as the field is called when read from Parquet


def _middle(image: Image.Image) -> Image.Image:
    """Cut the ends off an image that is longer than `MAX_ASPECT` times its shorter side."""
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))
