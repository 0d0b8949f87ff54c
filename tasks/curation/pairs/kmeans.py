"""Spherical k-means in torch, on the GPU if there is one: centroids of directions, and those nearest to each embedding.

As in faiss, which SemDeDup uses, training begins with random samples.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.curation.pairs.blocks import device, directions, each
from tasks.curation.pairs.clusters import MARGIN, PROBES, ROUNDS, SEED
from tasks.curation.pairs.embeddings import Vectors

BLOCK = 2_048

Centroids = NDArray[np.float32]


class Nearest(NamedTuple):
    """The clusters near each embedding: the nearest, its distance (1 - cosine), and others within `MARGIN`, else -1."""

    own: NDArray[np.int32]
    distance: NDArray[np.float32]
    others: NDArray[np.int32]


def train(sample: Vectors, clusters: int) -> Centroids:
    """Return the centroids of a sample of embeddings, (clusters, size), of length 1; fewer if there are fewer samples.

    The same sample gives the same centroids on one machine, up to the order of sums in its threads.
    """
    if not len(sample):
        return np.zeros((1, sample.shape[1]), np.float32)
    draw = torch.Generator().manual_seed(SEED)
    points = directions(sample)
    centroids = points[torch.randperm(len(points), generator=draw)[:clusters]]

    def nearest(block: torch.Tensor) -> torch.Tensor:
        return (block @ centroids.T).max(dim=1).indices

    for _ in range(ROUNDS):
        sums, sizes = torch.zeros_like(centroids), torch.zeros(len(centroids), device=centroids.device)
        blocks = points.split(BLOCK)
        for block, own in zip(blocks, each(nearest, blocks), strict=True):
            sums.index_add_(0, own, block)
            sizes += torch.bincount(own, minlength=len(centroids))
        empty = (sizes == 0).nonzero().flatten()
        sums[empty] = points[torch.randint(len(points), (len(empty),), generator=draw)]
        centroids = torch.nn.functional.normalize(sums, dim=1)
    return np.asarray(centroids.cpu().numpy(), np.float32)


def find_nearest(vectors: Vectors, centroids: Centroids) -> Nearest:
    """Return the clusters near each embedding, up to `PROBES` of them with its own."""
    targets = torch.tensor(centroids, device=device()).T
    count = min(PROBES, len(centroids))

    def nearest(start: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        best = torch.topk(directions(vectors[start : start + BLOCK]) @ targets, count)
        return best.values.cpu().numpy(), best.indices.int().cpu().numpy()

    cosines, places = np.empty((len(vectors), count), np.float32), np.empty((len(vectors), count), np.int32)
    starts = range(0, len(vectors), BLOCK)
    for start, found in zip(starts, each(nearest, starts), strict=True):
        cosines[start : start + BLOCK], places[start : start + BLOCK] = found
    places[cosines < cosines[:, :1] - np.float32(MARGIN)] = -1
    return Nearest(places[:, 0], 1 - cosines[:, 0], places[:, 1:])
