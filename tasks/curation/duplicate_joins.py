"""What duplicate rules join: pairs as edges between groups of equal samples, and the neighbours they make.

Pairs are stored compactly: equal codes as a star, near codes as one edge between two of their samples. So neighbours
are found by group: samples joined at distance 0 within a kind are one group, and an edge joins whole groups.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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

    @cached_property
    def groups(self) -> Mapping[str, NDArray[np.int32]]:
        """By kind, the number of each sample's group."""
        return {kind: edges.groups(len(self.ids)) for kind, edges in self.kinds.items()}

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


@dataclass(frozen=True)
class Joined:
    """What one kind of pairs joins by one rule: samples of one group, and groups that are near each other.

    `rule` is the rule's place and `group` each sample's group. Near groups are listed both ways, sorted by `start`.
    `passes_on` says that samples which were taken take others too, and `link` the distance of each sample where it is
    not that of the groups.
    """

    rule: int
    group: NDArray[np.int32]
    start: NDArray[np.int32]
    end: NDArray[np.int32]
    distance: NDArray[np.float32]
    passes_on: bool = False
    link: NDArray[np.float32] | None = None

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return int(self.group.max(initial=-1)) + 1

    def nearest(self, first: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """For each group the smallest of `first` in itself and in the groups near it, and the distance to that one."""
        found, distance = first.copy(), np.zeros(len(first), np.float32)
        order = np.lexsort((self.distance, first[self.end], self.start))
        starts, at = np.unique(self.start[order], return_index=True)
        best = order[at]
        is_nearer = first[self.end[best]] < first[starts]
        found[starts[is_nearer]] = first[self.end[best]][is_nearer]
        distance[starts[is_nearer]] = self.distance[best][is_nearer]
        return found, distance


def join_by_rules(evidence: Evidence, rules: Sequence[Rule], candidates: NDArray[np.integer]) -> list[Joined]:
    """Return what the rules join, rule by rule, and of each rule kind by kind."""
    joined = []
    for number, rule in enumerate(rules):
        if rule.confirm is None:
            kinds = [(evidence.kinds[kind], evidence.groups[kind]) for kind in rule.kinds]
            reach = rule.max_distance
        else:
            edges = [_confirmed(evidence, kind, rule.max_distance, rule.confirm) for kind in rule.kinds]
            kinds = [(one, one.groups(len(evidence.ids))) for one in edges]
            reach = math.inf  # what is too far is left out already, and equal codes are at `SMALLEST`
        if rule.method == "components":
            joined.append(_components(number, kinds, reach, candidates))
        else:
            passes_on = rule.method == "official"
            joined += [_near_groups(number, one, group, reach, passes_on=passes_on) for one, group in kinds]
    return joined


def _near_groups(number: int, edges: Edges, group: NDArray[np.int32], reach: float, *, passes_on: bool) -> Joined:
    near = (edges.distance > 0) & (edges.distance <= reach)
    one, other = group[edges.left[near]], group[edges.right[near]]
    start, end = np.concatenate([one, other]), np.concatenate([other, one])
    order = np.argsort(start, kind="stable")
    distance = np.concatenate([edges.distance[near]] * 2)[order]
    return Joined(number, group, start[order], end[order], distance, passes_on)


def _components(
    number: int, kinds: Sequence[tuple[Edges, NDArray[np.int32]]], max_distance: float, candidates: NDArray[np.integer]
) -> Joined:
    """Return components of candidates as groups, with each sample's smallest distance to a candidate in its own.

    Samples that are no candidates bridge nothing: each belongs to the component of its nearest candidate.
    """
    count = len(kinds[0][1])
    is_candidate = np.zeros(count, np.bool_)
    is_candidate[candidates] = True
    left, right, nodes = [], [], count
    link = np.full(count, np.inf, np.float32)
    nearest = np.arange(count)  # the node whose component a sample belongs to
    for edges, label in kinds:
        near = (edges.distance > 0) & (edges.distance <= max_distance)
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
    none = np.zeros(0, np.int32)
    return Joined(number, component, none, none, none.astype(np.float32), link=link)


def _confirmed(evidence: Evidence, kind: str, max_distance: float, confirm: float) -> Edges:
    """Return the pairs of a kind that semantic pairs confirm: samples in one group of both kinds stay a group."""
    count = len(evidence.ids)
    edges, semantic = evidence.kinds[kind], evidence.kinds["semantic"]
    label, meaning = evidence.groups[kind], evidence.groups["semantic"]
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
