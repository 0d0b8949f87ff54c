"""What duplicate rules join: pairs as edges between groups of equal samples, and the neighbours they make.

Pairs are stored compactly: equal codes as a star, near codes as one edge between two of their samples. So neighbours
are found by group: samples joined at distance 0 within a kind are one group, and an edge joins whole groups.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tasks.curation.pairs.hamming import Groups, Pairs
from tasks.curation.policy import Method

SMALLEST = np.float32(2**-24)
"""Distance of samples with equal codes that are no group, as they count only where something else agrees."""
CONFIRMED_PAIRS = 200_000_000
"""Pairs of embeddings that may be looked at to confirm others."""


@dataclass(frozen=True)
class Edges:
    """Pairs of one kind: positions of both samples in the evidence's `ids` (int32), and their distance (float32)."""

    left: NDArray[np.int32]
    right: NDArray[np.int32]
    distance: NDArray[np.float32]

    def groups(self, samples: int) -> NDArray[np.int32]:
        """Return the number of each sample's group: those at distance 0, in any steps."""
        equal = self.distance == 0
        return _connected(samples, self.left[equal], self.right[equal])


@dataclass(frozen=True)
class Evidence:
    """All pairs, by kind, over the samples in `ids`, which is sorted and without repeats."""

    ids: pa.StringArray
    kinds: Mapping[str, Edges]

    def find(self, sample_ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int32]:
        """Return each sample's position in `ids`, or -1 for a sample that is not there."""
        return np.asarray(pc.fill_null(pc.index_in(sample_ids, value_set=self.ids), -1))

    def components(self, reach: Mapping[str, float] = MappingProxyType({})) -> NDArray[np.int32]:
        """Return for each of `ids` the position of the smallest id that pairs of any kind lead to, in any steps.

        Of a kind in `reach`, only pairs up to that distance count.
        """
        left, right = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for kind, edges in self.kinds.items():
            counts = edges.distance <= reach.get(kind, np.inf)
            left.append(edges.left[counts])
            right.append(edges.right[counts])
        labels = _connected(len(self.ids), np.concatenate(left), np.concatenate(right))
        _, smallest = np.unique(labels, return_index=True)
        return smallest.astype(np.int32)[labels]


@dataclass(frozen=True)
class Rule:
    """A duplicate rule: the kinds of pairs that count, up to a distance that counts, and who takes whom.

    With `confirm`, a pair counts only if the embeddings of the two are also that near: 1 - cosine, by semantic pairs.
    """

    kinds: tuple[str, ...]
    max_distance: float
    method: Method = "greedy"
    confirm: float | None = None


class Neighbours:
    """Groups of equal samples by some edges, and the near groups of each. Plain lists: they are read one by one."""

    def __init__(self, edges: Edges, samples: int) -> None:
        label, near = edges.groups(samples), edges.distance > 0
        one, other = label[edges.left[near]], label[edges.right[near]]
        start, end = np.concatenate([one, other]), np.concatenate([other, one])
        by_start = np.argsort(start, kind="stable")
        count = int(label.max(initial=-1)) + 1
        self.label = label.tolist()
        self.samples: list[int] = np.argsort(label, kind="stable").tolist()
        self.first_sample = _starts(label, count)
        self.neighbours = end[by_start].tolist()
        self.distances = np.concatenate([edges.distance[near]] * 2)[by_start].tolist()
        self.first_neighbour = _starts(start, count)
        self.taken = [False] * count

    def around(self, sample: int, max_distance: float) -> list[tuple[float, int]]:
        """Distance and number of the sample's own group and of those near it, without groups already taken."""
        own = self.label[sample]
        begin, end = self.first_neighbour[own : own + 2]
        near = zip(self.distances[begin:end], self.neighbours[begin:end], strict=True)
        found = [(0.0, own), *((distance, group) for distance, group in near if distance <= max_distance)]
        return [(distance, group) for distance, group in found if not self.taken[group]]

    def take(self, group: int) -> list[int]:
        """The group's samples the first time, nothing after: whoever takes a group takes all of it."""
        if self.taken[group]:
            return []
        self.taken[group] = True
        begin, end = self.first_sample[group : group + 2]
        return self.samples[begin:end]


@dataclass(frozen=True)
class Joined:
    """What one rule joins: the neighbours by each kind, up to a distance, or whole components with each one's link."""

    kinds: Sequence[Neighbours]
    max_distance: float
    link: list[float] | None = None

    def take_around(self, sample: int) -> Iterator[tuple[int, float]]:
        """Yield samples joined with one, nearest first, with their distance; those of groups taken before may lack."""
        near = [
            (distance, kind, group)
            for kind, neighbours in enumerate(self.kinds)
            for distance, group in neighbours.around(sample, self.max_distance)
        ]
        for distance, kind, group in sorted(near):
            for other in self.kinds[kind].take(group):
                yield other, distance if self.link is None else self.link[other]


def join_by_rules(evidence: Evidence, rules: Sequence[Rule], candidates: NDArray[np.integer]) -> list[Joined]:
    """Return what each rule joins. Kinds that several rules use plainly are shared: what one took, none takes again."""
    count = len(evidence.ids)
    shared: dict[str, Neighbours] = {}
    joined = []
    for rule in rules:
        if rule.confirm is not None:
            edges = [_confirmed(evidence, kind, rule.max_distance, rule.confirm) for kind in rule.kinds]
            reach = math.inf  # what is too far is left out already, and equal codes are at `SMALLEST`
        else:
            edges, reach = [evidence.kinds[kind] for kind in rule.kinds], rule.max_distance
        if rule.method == "components":
            whole, link = _components(edges, reach, candidates, count)
            joined.append(Joined([Neighbours(whole, count)], 0, link.tolist()))
        elif rule.confirm is not None:
            joined.append(Joined([Neighbours(one, count) for one in edges], reach))
        else:
            for kind in set(rule.kinds) - set(shared):
                shared[kind] = Neighbours(evidence.kinds[kind], count)
            joined.append(Joined([shared[kind] for kind in rule.kinds], reach))
    return joined


def _components(
    kinds: Sequence[Edges], max_distance: float, candidates: NDArray[np.integer], count: int
) -> tuple[Edges, NDArray[np.float32]]:
    """Return components of candidates as stars, and each sample's smallest distance to a candidate in its own.

    Samples that are no candidates bridge nothing: each belongs to the component of its nearest candidate.
    """
    is_candidate = np.zeros(count, np.bool_)
    is_candidate[candidates] = True
    left, right, nodes = [], [], count
    link = np.full(count, np.inf, np.float32)
    nearest = np.arange(count)  # the node whose component a sample belongs to
    for edges in kinds:
        label, near = edges.groups(count), (edges.distance > 0) & (edges.distance <= max_distance)
        candidates_in = np.bincount(label[candidates], minlength=count)
        one = np.concatenate([label[edges.left[near]], label[edges.right[near]]])
        other = np.concatenate([label[edges.right[near]], label[edges.left[near]]])
        leads = candidates_in[other] > 0
        one, other, distance = one[leads], other[leads], np.concatenate([edges.distance[near]] * 2)[leads]
        both = candidates_in[one] > 0
        left += [candidates, one[both] + nodes]
        right += [label[candidates] + nodes, other[both] + nodes]
        order = np.lexsort((other, distance, one))
        groups, first = np.unique(one[order], return_index=True)
        nearest_group, group_link = np.arange(count), np.full(count, np.inf, np.float32)
        nearest_group[groups], group_link[groups] = other[order][first], distance[order][first]
        equal = candidates_in[label] - is_candidate > 0
        this_link = np.where(equal, np.float32(0), group_link[label])
        nearer = this_link < link
        link[nearer] = this_link[nearer]
        nearest[nearer] = np.where(equal, label, nearest_group[label])[nearer] + nodes
        nodes += count
    component = _connected(nodes, np.concatenate(left), np.concatenate(right))
    component = component[np.where(is_candidate, np.arange(count), nearest)]
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    others = np.flatnonzero(first[inverse] != np.arange(count)).astype(np.int32)
    centre = first[inverse][others].astype(np.int32)
    return Edges(centre, others, np.zeros(len(others), np.float32)), link


def _confirmed(evidence: Evidence, kind: str, max_distance: float, confirm: float) -> Edges:
    """Return the pairs of a kind that semantic pairs confirm: samples in one group of both kinds stay a group."""
    count = len(evidence.ids)
    edges, semantic = evidence.kinds[kind], evidence.kinds["semantic"]
    label, meaning = edges.groups(count), semantic.groups(count)
    cells, sample, cell_of = np.unique(meaning.astype(np.int64) * count + label, return_index=True, return_inverse=True)
    cell_meaning, cell_label = cells // max(count, 1), cells % max(count, 1)
    near = (semantic.distance > 0) & (semantic.distance <= confirm)
    sizes = np.bincount(cell_meaning, minlength=count)
    groups = Groups(np.arange(len(cells)), np.cumsum(sizes) - sizes, sizes)
    one, other = meaning[semantic.left[near]].astype(np.int64), meaning[semantic.right[near]].astype(np.int64)
    found = groups.expand(Pairs(one, other, semantic.distance[near]), CONFIRMED_PAIRS)
    distance = _distance_between(edges, label, cell_label[found.left], cell_label[found.right])
    kept = distance <= max(max_distance, float(SMALLEST))
    others = np.flatnonzero(sample[cell_of] != np.arange(count))
    return Edges(
        np.concatenate([sample[cell_of][others], sample[found.left[kept]]]).astype(np.int32),
        np.concatenate([others, sample[found.right[kept]]]).astype(np.int32),
        np.concatenate([np.zeros(len(others), np.float32), distance[kept]]),
    )


def _distance_between(
    edges: Edges, label: NDArray[np.int32], one: NDArray[np.int64], other: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the distance of pairs of groups: `SMALLEST` of a group and itself, infinite where there is no edge."""
    count, near = len(label), edges.distance > 0
    ends = np.stack([label[edges.left[near]], label[edges.right[near]]]).astype(np.int64)
    known = ends.min(axis=0) * count + ends.max(axis=0)
    order = np.argsort(known)
    wanted = np.minimum(one, other) * count + np.maximum(one, other)
    place = np.searchsorted(known, wanted, sorter=order)
    is_known = place < len(known)
    is_known[is_known] = known[order[place[is_known]]] == wanted[is_known]
    distance = np.full(len(wanted), np.inf, np.float32)
    distance[is_known] = edges.distance[near][order[place[is_known]]]
    return np.where(one == other, SMALLEST, distance)


def _connected(count: int, left: NDArray[np.integer], right: NDArray[np.integer]) -> NDArray[np.int32]:
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)


def _starts(labels: NDArray[np.int32], count: int) -> list[int]:
    """Where each label begins among the sorted labels, and where the last one ends."""
    starts: list[int] = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=count))]).tolist()
    return starts
