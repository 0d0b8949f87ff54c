"""Near embeddings by cosine, block by block within clusters and across the borders between them.

One matrix product in torch, on the GPU if there is one: there in float16, and what may be near again in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.curation.pairs.codes import Indices
from tasks.curation.pairs.embeddings import Vectors
from tasks.curation.pairs.hamming import Pairs

BLOCK, TILE = 1_024, 8_192
"""Rows and columns of cosines in memory at once."""
NEIGHBOURS = 256
"""Near ones that an embedding keeps in one cluster, the nearest: more would be a crowd, 318,000 icons for example."""
SAME = 0.005
"""In a crowd, what lies this near to another one counts as equal to it, whatever ε, and is not compared on."""
SLACK = 0.002
"""What a cosine may be off by in float16, so what is looked at again in float32."""
SMALLEST = np.float32(2**-24)
"""Distance of embeddings that differ, but by less than float32 can say: 0 is for equal ones."""


@dataclass(frozen=True)
class Clustered:
    """Different embeddings by number, those known before first: the row of each in `vectors`, and its clusters.

    `own` is the cluster an embedding lies in and `others`, of shape (embeddings, probes), those nearly as near, or -1.
    """

    vectors: Vectors
    rows: Indices
    own: NDArray[np.int32]
    others: NDArray[np.int32]
    old: int


def cosine_pairs(embeddings: Clustered, *, max_distance: float) -> Pairs:
    """Return the pairs of embeddings with 1 - cosine up to `max_distance`, `left < right`, in order, each once.

    Compared are embeddings of one cluster, and each embedding with those in clusters nearly as near as its own; pairs
    of two old ones are left out, not even compared. Distances are float32, 0 only for what counts as equal: an
    embedding with more than `NEIGHBOURS` near ones in its cluster keeps the nearest, and if one of them is within
    `SAME`, it counts as equal to that one and is compared no further. So time is bounded where a cluster is all alike.
    """
    if not 0 < max_distance < 1:
        raise ValueError(
            f"max_distance is {max_distance}. Use a number above 0 and below 1: 1 - cosine, 0.1 at most "
            "for what people would call similar."
        )
    search = _Search(embeddings, max_distance)
    found = [*search.within_clusters(), *search.across_borders()]
    left, right = (np.concatenate([np.zeros(0, np.int64), *(part[end] for part in found)]) for end in (0, 1))
    distance = np.concatenate([np.zeros(0, np.float32), *(part[2] for part in found)])
    left, right = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((right, left))
    return Pairs(left[order], right[order], distance[order])


class _Search:
    """One search: where the rows of each cluster are, and which rows are not compared on."""

    def __init__(self, embeddings: Clustered, max_distance: float) -> None:
        self.embeddings, self.max_distance = embeddings, max_distance
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_same = np.zeros(len(embeddings.rows), np.bool_)
        clusters = int(max(embeddings.own.max(initial=-1), embeddings.others.max(initial=-1))) + 1
        self.members = _by_cluster(embeddings.own, np.arange(len(embeddings.own)), clusters)
        visits = np.nonzero(embeddings.others >= 0)
        self.visitors = _by_cluster(embeddings.others[visits], visits[0], clusters)

    def within_clusters(self) -> Iterator[Pairs]:
        """Yield the near pairs of new members of a cluster with all of its members."""
        for members in self.members:
            first = int(np.searchsorted(members, self.embeddings.old))
            for start in range(first, len(members), BLOCK):
                block = members[start : start + BLOCK]
                yield self._with_earlier(block, members[:start])
                block = block[~self.is_same[block]]
                yield self._near(block, block, below_diagonal=True)

    def across_borders(self) -> Iterator[Pairs]:
        """Yield the near pairs of embeddings with the members of other clusters that they are nearly as near to."""
        old = self.embeddings.old
        for members, visitors in zip(self.members, self.visitors, strict=True):
            members, visitors = members[~self.is_same[members]], visitors[~self.is_same[visitors]]
            for start in range(0, len(visitors), BLOCK):
                block = visitors[start : start + BLOCK]
                known = int(np.searchsorted(block, old))
                for one, other in ((block[:known], members[members >= old]), (block[known:], members)):
                    yield self._once(self._near(one, other))

    def _with_earlier(self, block: Indices, earlier: Indices) -> Pairs:
        """Return the near pairs of a block with the members before it; embeddings in a crowd become the same as one."""
        found = self._near(block, earlier[~self.is_same[earlier]], keep=NEIGHBOURS + 1)
        counts = np.bincount(np.searchsorted(block, found.left), minlength=len(block))
        in_crowd = counts > NEIGHBOURS
        if not in_crowd.any():
            return found
        order = np.lexsort((found.distance, found.left))
        left, right, distance = found.left[order], found.right[order], found.distance[order]
        owner = np.searchsorted(block, left)
        rank = np.arange(len(left)) - (np.cumsum(counts) - counts)[owner]
        is_same = np.zeros(len(block), np.bool_)
        is_same[owner[(rank == 0) & in_crowd[owner] & (distance <= SAME)]] = True
        self.is_same[block[is_same]] = True
        distance = np.where(is_same[owner], np.float32(0), distance)
        kept = rank < np.where(is_same, 1, NEIGHBOURS)[owner]
        return Pairs(left[kept], right[kept], distance[kept])

    def _once(self, found: Pairs) -> Pairs:
        """Leave out the pairs that are found from the other side as well, if that is the one to report them."""
        own, others = self.embeddings.own, self.embeddings.others
        is_mutual = (others[found.right] == own[found.left][:, None]).any(axis=1)
        kept = ~is_mutual | (own[found.left] < own[found.right])
        return Pairs(found.left[kept], found.right[kept], found.distance[kept])

    def _near(self, block: Indices, others: Indices, *, below_diagonal: bool = False, keep: int = NEIGHBOURS) -> Pairs:
        """Return the near pairs of one of `block` and one of `others`, the `keep` nearest of each of `block`."""
        rows, parts = self._load(block), []
        for start in range(0, len(others) if len(block) else 0, TILE):
            columns = self._load(others[start : start + TILE])
            left, right, cosine = self._hits(rows, columns, below_diagonal=below_diagonal, keep=keep)
            distance = np.maximum(1 - cosine, SMALLEST)
            near = distance <= np.float32(self.max_distance)
            parts.append(Pairs(left[near], right[near] + start, distance[near]))
        if not parts:
            return Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        left, right, distance = (np.concatenate(part) for part in zip(*parts, strict=True))
        if len(parts) > 1:
            kept = _nearest_of_each(left, distance, keep)
            left, right, distance = left[kept], right[kept], distance[kept]
        return Pairs(block[left], others[right], distance)

    def _hits(
        self, rows: torch.Tensor, columns: torch.Tensor, *, below_diagonal: bool, keep: int
    ) -> tuple[Indices, Indices, NDArray[np.float32]]:
        """Return places in `rows` and `columns` of all pairs that may be near, and their cosine in float32."""
        is_half = self.device.type == "cuda"
        cosines = rows.half() @ columns.half().T if is_half else rows @ columns.T
        near = cosines >= 1 - self.max_distance - (SLACK if is_half else 0)
        if below_diagonal:
            near = near.tril(-1)
        counts = near.sum(dim=1)
        if int(counts.max()) > keep:
            least = torch.topk(cosines.masked_fill(~near, -2), keep, dim=1).values[:, -1:]
            near &= cosines >= least - (SLACK if is_half else 0)
        left, right = near.nonzero(as_tuple=True)
        exact = (rows[left] * columns[right]).sum(dim=1) if is_half else cosines[left, right]
        return left.cpu().numpy(), right.cpu().numpy(), exact.cpu().numpy()

    def _load(self, numbers: Indices) -> torch.Tensor:
        """Return embeddings as float32 of length 1."""
        vectors = torch.from_numpy(np.asarray(self.embeddings.vectors[self.embeddings.rows[numbers]]))
        return torch.nn.functional.normalize(vectors.to(self.device).float(), dim=1)


def _by_cluster(clusters: NDArray[np.int32], numbers: Indices, count: int) -> list[Indices]:
    """Return the numbers in each cluster, ascending."""
    order = np.argsort(clusters, kind="stable")
    return np.split(numbers[order], np.cumsum(np.bincount(clusters, minlength=count))[:-1]) if count else []


def _nearest_of_each(left: Indices, distance: NDArray[np.float32], keep: int) -> Indices:
    """Return the places of the `keep` smallest distances of each one in `left`."""
    order = np.lexsort((distance, left))
    counts = np.bincount(left)
    rank = np.arange(len(left)) - (np.cumsum(counts) - counts)[left[order]]
    return order[rank < keep]
