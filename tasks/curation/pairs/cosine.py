"""Near embeddings by cosine, block by block within clusters and across the borders between them.

One matrix product in torch, on the GPU if there is one: there in float16, and what may be near again in float32.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.curation.pairs.blocks import device, directions, each
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
    clusters = range(len(search.members))
    found = [part for parts in each(search.within, clusters) for part in parts]
    found += [part for parts in each(search.across_border, clusters) for part in parts]
    left, right = (np.concatenate([np.zeros(0, np.int64), *(part[end] for part in found)]) for end in (0, 1))
    distance = np.concatenate([np.zeros(0, np.float32), *(part[2] for part in found)])
    left, right = np.minimum(left, right), np.maximum(left, right)
    order = np.lexsort((right, left))
    return Pairs(left[order], right[order], distance[order])


class _Search:
    """One search: where the rows of each cluster are, and which rows are not compared on."""

    def __init__(self, embeddings: Clustered, max_distance: float) -> None:
        self.embeddings, self.max_distance = embeddings, max_distance
        self.is_half = device().type == "cuda"
        self.is_same = np.zeros(len(embeddings.rows), np.bool_)
        clusters = int(max(embeddings.own.max(initial=-1), embeddings.others.max(initial=-1))) + 1
        self.members = _by_cluster(embeddings.own, np.arange(len(embeddings.own)), clusters)
        visits = np.nonzero(embeddings.others >= 0)
        self.visitors = _by_cluster(embeddings.others[visits], visits[0], clusters)

    def within(self, cluster: int) -> list[Pairs]:
        """Return in parts the near pairs of new members of a cluster with all of its members."""
        members, found = self.members[cluster], []
        first = int(np.searchsorted(members, self.embeddings.old))
        for start in range(first, len(members), BLOCK):
            block = members[start : start + BLOCK]
            found.append(self._with_earlier(block, members[:start]))
            block = block[~self.is_same[block]]
            found.append(self._near(block, block, below_diagonal=True))
        return found

    def across_border(self, cluster: int) -> list[Pairs]:
        """Return in parts the near pairs of a cluster's members with embeddings nearly as near to it as to their own.

        Wants `within` done for all clusters.
        """
        members, visitors = (part[~self.is_same[part]] for part in (self.members[cluster], self.visitors[cluster]))
        old, found = self.embeddings.old, []
        for start in range(0, len(visitors), BLOCK):
            block = visitors[start : start + BLOCK]
            known = int(np.searchsorted(block, old))
            for one, other in ((block[:known], members[members >= old]), (block[known:], members)):
                found.append(self._once(self._near(one, other)))
        return found

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
        parts = [Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
        if len(block) and len(others):
            rows = self._load(block)
            for start in range(0, len(others), TILE):
                columns = rows if below_diagonal else self._load(others[start : start + TILE])
                left, right, distance = self._hits(rows, columns, below_diagonal=below_diagonal, keep=keep)
                parts.append(Pairs(left, right + start, distance))
        left, right, distance = (np.concatenate(part) for part in zip(*parts, strict=True))
        if len(parts) > 2:
            kept = _nearest_of_each(left, distance, keep)
            left, right, distance = left[kept], right[kept], distance[kept]
        return Pairs(block[left], others[right], distance)

    def _hits(
        self, rows: torch.Tensor, columns: torch.Tensor, *, below_diagonal: bool, keep: int
    ) -> tuple[Indices, Indices, NDArray[np.float32]]:
        """Return the places in `rows` and `columns` of near pairs, and their distance by a product in float32."""
        cosines = rows.half() @ columns.half().T if self.is_half else rows @ columns.T
        if below_diagonal:
            cosines += torch.full_like(cosines, -4).triu()
        slack = SLACK if self.is_half else 0
        flat = _where(cosines >= 1 - self.max_distance - slack)
        left, right = np.divmod(flat, len(columns))
        if len(flat) > keep and np.bincount(left).max() > keep:
            least = torch.topk(cosines, keep, dim=1).values[:, -1:].clamp(min=1 - self.max_distance)
            left, right = np.divmod(_where(cosines >= least - slack), len(columns))
        if self.is_half:
            exact = (rows[torch.from_numpy(left)] * columns[torch.from_numpy(right)]).sum(dim=1).cpu().numpy()
        else:
            exact = cosines.numpy()[left, right]
        distance = np.maximum(1 - exact, SMALLEST)
        near = distance <= np.float32(self.max_distance)
        return left[near], right[near], distance[near]

    def _load(self, numbers: Indices) -> torch.Tensor:
        return directions(np.asarray(self.embeddings.vectors[self.embeddings.rows[numbers]]))


def _where(near: torch.Tensor) -> Indices:
    """Return the places of what is true in a flattened matrix; numpy finds them faster than torch on a CPU."""
    flat = near.view(-1)
    found = flat.nonzero().view(-1).cpu().numpy() if near.is_cuda else np.flatnonzero(flat.numpy())
    return np.asarray(found, np.int64)


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
