"""Which of some given centroids an image lies nearest to in CLIP's space, and whether that one is wanted."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.signals.clip import Clip, stored_embeddings
from tasks.curation.signals.contract import Signal
from tasks.curation.signals.pinned_file import PinnedFile

_BLOCK_BYTES = 128 * 2**20
"""Largest table of inner products at once; DataComp's 100,000 centroids would need gigabytes for a batch."""


@dataclass(frozen=True)
class Cluster(Signal):
    """The centroid of largest inner product with the image embedding, the first of equals: DataComp's `image_based`.

    `centroids` is a .npy file of numbers of shape (clusters, embedding size), from the same CLIP model as `clip`;
    `wanted` one of whole numbers, the clusters to keep, such as those that ImageNet's images lie in.
    """

    clip: Clip
    centroids: PinnedFile
    wanted: PinnedFile

    name = "cluster"
    version = 1
    needs = Needs.NOTHING
    columns = pa.schema(
        [
            column("cluster", pa.int32(), "row of the nearest centroid, from 0; null if the image can't be decoded"),
            column("cluster_wanted", pa.bool_(), "the cluster is in the list of wanted ones"),
        ]
    )

    @property
    def source(self) -> Signal:
        """See `Signal.source`."""
        return self.clip

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`. Raises `ValueError` if the arrays in the files don't fit."""
        centroids, wanted = self._arrays()
        size = self.clip.checkpoint.embedding_size
        if centroids.ndim != 2 or centroids.dtype.kind != "f" or centroids.shape[1] != size:
            raise ValueError(
                f"{self.centroids.file} holds {centroids.dtype} of shape {centroids.shape}, and CLIP {self.clip.model} "
                f"gives embeddings of {size} numbers. Give centroids of shape (clusters, {size}) from the same model."
            )
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu" or not np.isin(wanted, np.arange(len(centroids))).all():
            raise ValueError(
                f"{self.wanted.file} holds {wanted.dtype} of shape {wanted.shape}. Give a list of whole numbers from 0 "
                f"to {len(centroids) - 1}, rows of {self.centroids.file}."
            )
        return {"centroids": self.centroids.sha256, "wanted": self.wanted.sha256}

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        assert batch.measured is not None
        embeddings, has_image = stored_embeddings(batch.measured)
        centroids, wanted = self._arrays()
        clusters = np.zeros(len(batch), np.int32)
        clusters[has_image] = nearest(embeddings, centroids)
        missing = ~has_image
        return pa.record_batch(
            [pa.array(clusters, mask=missing), pa.array(np.isin(clusters, wanted), mask=missing)], schema=self.columns
        )

    def _arrays(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return _read(self.centroids.path(), self.centroids.sha256), _read(self.wanted.path(), self.wanted.sha256)


def nearest(embeddings: npt.NDArray[np.float32], centroids: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.int32]:
    """Return for each row of `embeddings` the row of `centroids` with the largest inner product."""
    rows = max(1, _BLOCK_BYTES // (4 * len(centroids)))
    across = centroids.astype(np.float32, copy=False).T
    parts = [np.argmax(embeddings[at : at + rows] @ across, axis=1) for at in range(0, len(embeddings), rows)]
    return np.concatenate([np.empty(0, np.int32), *parts]).astype(np.int32)


@cache
def _read(path: Path, sha256: str) -> npt.NDArray[Any]:
    """Read an array once a process; the checksum, already found right, tells files that came to lie there apart."""
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}.") from None
