"""What signals that are a head on CLIP's image embedding have in common: a number an image, without its pixels."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.curation.batch import Batch, Needs
from tasks.curation.signals.clip import Clip, stored_embeddings
from tasks.curation.signals.contract import Signal
from tasks.curation.signals.pinned_file import PinnedFile

EMBEDDING_SIZE = 768
"""Length of the embeddings of OpenAI's ViT-L/14, which LAION's heads were trained on."""


@dataclass(frozen=True)
class ClipHead(Signal):
    """A head on the stored embeddings of `clip`, which must be OpenAI's ViT-L/14: no other fits the weights."""

    clip: Clip
    weights: PinnedFile

    needs = Needs.NOTHING

    @property
    def source(self) -> Signal:
        """See `Signal.source`."""
        return self.clip

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`. Raises `ValueError` if the embeddings are of another length than the head takes."""
        size = self.clip.checkpoint.embedding_size
        if size != EMBEDDING_SIZE:
            raise ValueError(
                f"signal {self.name} takes the {EMBEDDING_SIZE} numbers of OpenAI's ViT-L/14, and CLIP "
                f"{self.clip.model} gives {size}. Measure with clip_model ViT-L-14 and clip_pretrained openai, or "
                f"leave {self.name} out."
            )
        self.weights.path()
        return {"weights": self.weights.sha256}

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        assert batch.measured is not None
        embeddings, has_image = stored_embeddings(batch.measured)
        scores = np.zeros(len(batch), np.float32)
        if has_image.any():
            head_model = importlib.import_module("tasks.curation.signals.head_model")  # torch takes seconds
            scores[has_image] = head_model.score(self.name, self.weights.path(), self.weights.sha256, embeddings)
        return pa.record_batch([pa.array(scores, mask=~has_image)], schema=self.columns)
