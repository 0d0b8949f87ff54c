"""Spherical k-means in torch, on the GPU if there is one: centroids of directions, and those nearest to each embedding.

As in faiss, which SemDeDup uses: random samples to begin with, a few hundred samples a cluster to train on. 20 rounds
in place of the paper's 100, as later ones move few samples.
"""

from collections.abc import Iterator
from math import isqrt
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.curation.pairs.embeddings import Vectors

FEW = 20_000
"""Samples up to which one cluster holds all, so that every two are compared."""
SAMPLED = 256
"""Samples a cluster to train on, at most; faiss's own limit too."""
MOST_CLUSTERS = 4_096
"""Clusters at most: training takes time with their square."""
ROUNDS, SEED = 20, 1234
PROBES = 3
"""Clusters that an embedding may be compared with: its own and the next nearest ones."""
MARGIN = 0.1
"""How much less near than its own a cluster may be (difference of cosines) for an embedding to be compared with it.

Two near embeddings lie in different clusters if the border runs between them, so both are close to the border.
"""
BLOCK = 4_096

Centroids = NDArray[np.float32]


class Nearest(NamedTuple):
    """The clusters near each embedding: the nearest, its distance (1 - cosine), and others within `MARGIN`, else -1."""

    own: NDArray[np.int32]
    distance: NDArray[np.float32]
    others: NDArray[np.int32]


def cluster_count(samples: int) -> int:
    """Return into how many clusters to cut so many samples: about the square root of their number."""
    return 1 if samples <= FEW else min(isqrt(samples), MOST_CLUSTERS)


def train(sample: Vectors, clusters: int) -> Centroids:
    """Return the centroids of a sample of embeddings, (clusters, size), of length 1; fewer if there are fewer samples.

    The same sample gives the same centroids on one machine, up to the order of sums in its threads.
    """
    if not len(sample):
        return np.zeros((1, sample.shape[1]), np.float32)
    device = _device()
    draw = torch.Generator().manual_seed(SEED)
    first = torch.randperm(len(sample), generator=draw)[:clusters]
    centroids = _directions(sample[first.numpy()], device)
    for _ in range(ROUNDS):
        sums, sizes = torch.zeros_like(centroids), torch.zeros(len(centroids), device=device)
        for block in _blocks(sample, device):
            nearest = (block @ centroids.T).argmax(dim=1)
            sums.index_add_(0, nearest, block)
            sizes += torch.bincount(nearest, minlength=len(centroids))
        empty = (sizes == 0).nonzero().flatten().cpu()
        sums[empty] = _directions(sample[torch.randint(len(sample), (len(empty),), generator=draw).numpy()], device)
        centroids = torch.nn.functional.normalize(sums, dim=1)
    return np.asarray(centroids.cpu().numpy(), np.float32)


def find_nearest(vectors: Vectors, centroids: Centroids) -> Nearest:
    """Return the clusters near each embedding, up to `PROBES` of them with its own."""
    device = _device()
    targets = torch.tensor(centroids, device=device).T
    count = min(PROBES, len(centroids))
    found = [torch.topk(block @ targets, count) for block in _blocks(vectors, device)]
    cosines = np.concatenate([np.zeros((0, count), np.float32), *(best.values.cpu().numpy() for best in found)])
    places = np.concatenate([np.zeros((0, count), np.int32), *(best.indices.cpu().numpy() for best in found)])
    places = np.where(cosines < cosines[:, :1] - np.float32(MARGIN), -1, places).astype(np.int32)
    return Nearest(places[:, 0], 1 - cosines[:, 0], places[:, 1:])


def _blocks(vectors: Vectors, device: torch.device) -> Iterator[torch.Tensor]:
    for start in range(0, len(vectors), BLOCK):
        yield _directions(vectors[start : start + BLOCK], device)


def _directions(vectors: Vectors, device: torch.device) -> torch.Tensor:
    """Return embeddings as float32 of length 1."""
    return torch.nn.functional.normalize(torch.tensor(vectors, device=device).float(), dim=1)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
