"""Duplicates: who survives among samples that pairs join, and which groups all pairs together make.

Pairs are stored compactly: equal codes as a star, near codes as one edge between two of their samples. So neighbours
are found by group: samples joined at distance 0 within a kind are one group, and an edge joins whole groups.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from storage.refs import PairsRef
from storage.schema import PAIRS
from storage.warehouse import Warehouse


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

    def among(self, present: NDArray[np.bool_]) -> "Edges":
        """Return the same about the samples that are `present` alone: stars around another sample where one is gone."""
        nobody = len(present)
        group, samples = self.groups(nobody), np.flatnonzero(present).astype(np.int32)
        centre = np.full(nobody, nobody, np.int32)
        np.minimum.at(centre, group[samples], samples)
        others = samples[centre[group[samples]] != samples]
        near = self.distance > 0
        left, right = centre[group[self.left[near]]], centre[group[self.right[near]]]
        both = (left < nobody) & (right < nobody)
        return Edges(
            np.concatenate([centre[group[others]], left[both]]),
            np.concatenate([others, right[both]]),
            np.concatenate([np.zeros(len(others), np.float32), self.distance[near][both]]),
        )


@dataclass(frozen=True)
class Evidence:
    """All pairs, by kind, over the samples in `ids`, which is sorted and without repeats."""

    ids: pa.StringArray
    kinds: Mapping[str, Edges]

    def find(self, sample_ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int32]:
        """Return each sample's position in `ids`, or -1 for a sample that is not there."""
        return np.asarray(pc.fill_null(pc.index_in(sample_ids, value_set=self.ids), -1))

    def among(self, present: NDArray[np.bool_]) -> "Evidence":
        """Return the pairs of the samples that are `present`; the others stay in `ids`, in no pair."""
        return Evidence(self.ids, {kind: edges.among(present) for kind, edges in self.kinds.items()})

    def components(self) -> NDArray[np.int32]:
        """Return for each of `ids` the position of the smallest id that pairs of any kind lead to, in any steps."""
        left = np.concatenate([np.zeros(0, np.int32), *(edges.left for edges in self.kinds.values())])
        right = np.concatenate([np.zeros(0, np.int32), *(edges.right for edges in self.kinds.values())])
        labels = _connected(len(self.ids), left, right)
        _, smallest = np.unique(labels, return_index=True)
        return smallest.astype(np.int32)[labels]


@dataclass(frozen=True)
class Rule:
    """A duplicate rule: the kinds of pairs that count, up to a distance that counts."""

    kinds: tuple[str, ...]
    max_distance: float


@dataclass(frozen=True)
class Survivors:
    """For each of the evidence's `ids`: the survivor in its place, the rule that joins them and their distance.

    `survivor` is a position in `ids` and -1 for samples that are nobody's duplicate; there `rule` is -1 and
    `distance` is NaN.
    """

    survivor: NDArray[np.int32]
    rule: NDArray[np.int32]
    distance: NDArray[np.float32]


def read_evidence(
    pairs: Sequence[PairsRef], *, sample_ids: pa.ChunkedArray, warehouse: Warehouse
) -> tuple[Evidence, NDArray[np.int32]]:
    """Read the pairs of any kinds among `sample_ids`, the pool's; returns them with each sample's position in `ids`.

    Tables may also speak of samples outside the pool, which are left out: samples equal or near through them stay so,
    for that is a matter of their codes.
    """
    tables = {ref.kind: warehouse.read_tables(ref.paths, PAIRS) for ref in pairs}
    ends = [table[name] for table in tables.values() for name in ("left_id", "right_id")]
    ids = pc.unique(pa.chunked_array([chunk for column in ends for chunk in column.chunks], pa.string()))
    ids = ids.take(pc.sort_indices(ids))
    kinds = {}
    for kind, table in tables.items():
        left, right = (np.asarray(pc.index_in(table[name], value_set=ids)) for name in ("left_id", "right_id"))
        kinds[kind] = Edges(left.astype(np.int32), right.astype(np.int32), np.asarray(table["distance"]))
    evidence = Evidence(ids, kinds)
    positions = evidence.find(sample_ids)
    present = np.zeros(len(ids), np.bool_)
    present[positions[positions >= 0]] = True
    return (evidence if present.all() else evidence.among(present)), positions


def choose_survivors(evidence: Evidence, rules: Sequence[Rule], *, candidates: NDArray[np.integer]) -> Survivors:
    """Let the best samples survive and stand in for all their neighbours.

    `candidates` are positions in the evidence's ids, best first; only they can survive. In that order, each one that
    has not been taken survives and takes all its neighbours that have not been taken, so a survivor never has a better
    survivor for neighbour, and every duplicate is a neighbour of its survivor. A neighbour is named by the first of
    `rules` that joins the two, and its distance is the smallest under that rule.

    Time is linear in samples and pairs, also where thousands are equal.
    """
    groups = {kind: _Groups(edges, len(evidence.ids)) for kind, edges in evidence.kinds.items()}
    survivor = [FREE] * len(evidence.ids)
    named_by = [-1] * len(survivor)
    distances = [float("nan")] * len(survivor)
    for best in candidates.tolist():
        if survivor[best] != FREE:
            continue
        survivor[best] = SURVIVES
        for number, rule in enumerate(rules):
            near = [
                (distance, kind, group)
                for kind in rule.kinds
                for distance, group in groups[kind].around(best, rule.max_distance)
            ]
            for distance, kind, group in sorted(near):
                for sample in groups[kind].take(group):
                    if survivor[sample] == FREE:
                        survivor[sample], named_by[sample], distances[sample] = best, number, distance
    return Survivors(
        np.maximum(np.array(survivor, np.int32), -1), np.array(named_by, np.int32), np.array(distances, np.float32)
    )


FREE, SURVIVES = -1, -2


class _Groups:
    """Groups of equal samples within one kind, and the near groups of each. Plain lists: they are read one by one."""

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


def _connected(count: int, left: NDArray[np.int32], right: NDArray[np.int32]) -> NDArray[np.int32]:
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int32)


def _starts(labels: NDArray[np.int32], count: int) -> list[int]:
    """Where each label begins among the sorted labels, and where the last one ends."""
    starts: list[int] = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=count))]).tolist()
    return starts
