"""Spherical k-means: centroids of directions, by faiss, and the centroids nearest to each embedding, by torch.

The settings are SemDeDup's (Abbas et al. 2023), but for 20 rounds in place of 100, which move few samples more.
"""

from math import isqrt
from typing import NamedTuple

import faiss
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
    size = sample.shape[1]
    if not len(sample):
        return np.zeros((1, size), np.float32)
    points = torch.nn.functional.normalize(torch.from_numpy(sample).float(), dim=1).numpy()
    means = faiss.Kmeans(
        size,
        min(clusters, len(points)),
        niter=ROUNDS,
        seed=SEED,
        spherical=True,
        max_points_per_centroid=SAMPLED,
        min_points_per_centroid=1,
    )
    means.train(points)
    return np.asarray(means.centroids, np.float32)


def find_nearest(vectors: Vectors, centroids: Centroids) -> Nearest:
    """Return the clusters near each embedding, up to `PROBES` of them with its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    targets = torch.tensor(centroids, device=device).T
    count = min(PROBES, len(centroids))
    cosines, places = np.empty((len(vectors), count), np.float32), np.empty((len(vectors), count), np.int32)
    for start in range(0, len(vectors), BLOCK):
        block = torch.from_numpy(vectors[start : start + BLOCK]).to(device).float()
        best = torch.topk(torch.nn.functional.normalize(block, dim=1) @ targets, count)
        cosines[start : start + BLOCK], places[start : start + BLOCK] = best.values.cpu(), best.indices.cpu()
    places[cosines < cosines[:, :1] - np.float32(MARGIN)] = -1
    return Nearest(places[:, 0], 1 - cosines[:, 0], places[:, 1:])
