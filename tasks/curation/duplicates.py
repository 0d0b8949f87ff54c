"""Duplicates: who survives among samples that pairs join.

What pairs join is in `duplicate_joins`; here the best samples of a policy take their duplicates, by one of three rules.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.refs import PairsRef
from storage.schema import PAIRS
from storage.warehouse import Warehouse
from tasks.curation.duplicate_joins import Edges, Evidence, Joined, Rule, join_by_rules
from tasks.curation.pairs.compact import encode_pairs, only_wanted
from tasks.curation.pairs.hamming import Pairs


@dataclass(frozen=True)
class Survivors:
    """For each of the evidence's `ids`: the survivor in its place, the rule that joins them and a distance.

    `survivor` is a position in `ids` and -1 for samples that are nobody's duplicate; there `rule` is -1 and
    `distance` is NaN. The distance is that of the pair by which the sample was taken, see `choose_survivors`.
    """

    survivor: NDArray[np.int32]
    rule: NDArray[np.int32]
    distance: NDArray[np.float32]


def read_evidence(
    pairs: Sequence[PairsRef], *, sample_ids: pa.ChunkedArray, warehouse: Warehouse
) -> tuple[Evidence, NDArray[np.int32]]:
    """Read the pairs of any kinds among `sample_ids`, the pool's; returns them with each sample's position in `ids`.

    Tables may also speak of samples outside the pool, which are left out and join nobody; only samples that equal the
    same one outside are equal still, for that is a matter of their codes.
    """
    return StoredPairs.read(pairs, warehouse).among(sample_ids)


@dataclass(frozen=True)
class StoredPairs:
    """Pairs of several kinds as they lie in their tables: places in `ids`, which is sorted and without repeats."""

    ids: pa.StringArray
    kinds: Mapping[str, Pairs]

    @classmethod
    def read(cls, pairs: Sequence[PairsRef], warehouse: Warehouse) -> "StoredPairs":
        """Read the tables."""
        ids, tables = encode_pairs([warehouse.read_tables(ref.paths, PAIRS) for ref in pairs])
        return cls(ids, dict(zip((ref.kind for ref in pairs), tables, strict=True)))

    def among(self, sample_ids: pa.ChunkedArray) -> tuple[Evidence, NDArray[np.int32]]:
        """Return what `read_evidence` returns for these samples."""
        positions = np.asarray(pc.fill_null(pc.index_in(sample_ids, value_set=self.ids), -1))
        wanted = np.zeros(len(self.ids) + 1, bool)
        wanted[positions] = True  # -1 falls on the last one
        stored = {kind: only_wanted(pairs, wanted[:-1]) for kind, pairs in self.kinds.items()}
        is_paired = np.zeros(len(wanted), bool)
        for pairs in stored.values():
            is_paired[pairs.left] = is_paired[pairs.right] = True
        place = np.where(is_paired, np.cumsum(is_paired) - 1, -1).astype(np.int32)
        kinds = {
            kind: Edges(place[pairs.left], place[pairs.right], pairs.distance.astype(np.float32))
            for kind, pairs in stored.items()
        }
        return Evidence(self.ids.filter(pa.array(is_paired[:-1])), kinds), place[positions]


def choose_survivors(evidence: Evidence, rules: Sequence[Rule], *, candidates: NDArray[np.integer]) -> Survivors:
    """Let the best samples survive and stand in for their duplicates.

    `candidates` are positions in the evidence's ids, best first; only they can survive, and only they take others. In
    that order, each one that has not been taken survives and takes, of those not taken yet, by the rule's method:

    greedy: its neighbours. So a survivor never has a better survivor for neighbour, and a duplicate's survivor is its
        neighbour.
    official: its neighbours too, and each sample that was taken, whatever by, takes its own neighbours in turn, for its
        survivor. That is SemDeDup's code: a sample goes if any earlier one is near it, also one that goes itself.
    components: all that pairs lead to from candidate to candidate, in any steps, and what is next to these.

    Of a~b and b~c in the order a, b, c, where a and c are no pair: greedy keeps a and c, official a (b takes c),
    components a; in the order b, a, c all keep b; in the order a, c, b greedy and official keep a and c.
    A sample is named by the first of `rules` that joins the two, and its distance is the smallest to who took it; by
    components, to any other of its component.

    Time is linear in samples and pairs, also where thousands are equal.
    """
    joined = join_by_rules(evidence, rules, candidates)
    survives, first = _who_takes(joined, candidates)
    taker = np.full(len(evidence.ids), NOBODY)
    named_by = np.full(len(taker), -1, np.int32)
    distances = np.full(len(taker), np.nan, np.float32)
    for one, first_takers in zip(joined, first, strict=True):
        by_group, group_distance = one.nearest(first_takers)
        found = by_group[one.group]
        distance = group_distance[one.group] if one.link is None else one.link
        is_nearer = (found == taker) & (named_by == one.rule) & (distance < distances)
        better = (found < taker) | is_nearer
        taker[better], named_by[better], distances[better] = found[better], one.rule, distance[better]
    stays = taker == NOBODY
    stays[candidates[survives]] = True
    named_by[stays], distances[stays] = -1, np.nan
    survivor = np.arange(len(taker))
    survivor[~stays] = candidates[taker[~stays]]
    while not stays[survivor].all():  # who takes may have been taken before
        survivor = survivor[survivor]
    return Survivors(np.where(stays, -1, survivor).astype(np.int32), named_by, distances)


def _who_takes(
    joined: Sequence[Joined], candidates: NDArray[np.integer]
) -> tuple[NDArray[np.bool_], list[NDArray[np.int64]]]:
    """Return which candidates survive, and for each of `joined` the place of the first candidate to take each group.

    Who takes anything takes whole groups. Where samples that were taken pass it on, all candidates take, so it is
    enough to look for an earlier one; elsewhere only survivors do, and one has to go from candidate to candidate.
    """
    survives = np.ones(len(candidates), bool)
    for one in joined:
        if one.passes_on:
            earliest, _ = one.nearest(_first(one, candidates, survives | True))
            survives &= earliest[one.group[candidates]] == np.arange(len(candidates))
    walked = [one for one in joined if not one.passes_on]
    leads = survives.copy()  # first wherever they could be taken, so that nobody need be asked before them
    for one in walked:
        earliest, _ = one.nearest(_first(one, candidates, survives))
        leads &= earliest[one.group[candidates]] == np.arange(len(candidates))
    gone = [bytearray(one.nearest(_first(one, candidates, leads))[0] != NOBODY) for one in walked]
    for one, is_gone in zip(walked, gone, strict=True):
        survives &= leads | (np.frombuffer(is_gone, bool)[one.group[candidates]] == 0)
    left = np.flatnonzero(survives & ~leads)
    ends = [one.end.tolist() for one in walked]
    bounds = [np.searchsorted(one.start, np.arange(one.groups + 1)).tolist() for one in walked]
    groups_of = zip(*(one.group[candidates[left]].tolist() for one in walked), strict=True)
    for place, groups in zip(left.tolist(), groups_of, strict=bool(walked)):
        for is_gone, group in zip(gone, groups, strict=True):
            if is_gone[group]:
                survives[place] = False
                break
        else:
            for is_gone, group, end, bound in zip(gone, groups, ends, bounds, strict=True):
                is_gone[group] = True
                for near in end[bound[group] : bound[group + 1]]:
                    is_gone[near] = True
    return survives, [_first(one, candidates, survives | one.passes_on) for one in joined]


def _first(one: Joined, candidates: NDArray[np.integer], take: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The place of the first candidate in each group, of those that take."""
    first = np.full(one.groups, NOBODY)
    places = np.flatnonzero(take)[::-1]
    first[one.group[candidates[places]]] = places  # the last one written stays
    return first


NOBODY = np.iinfo(np.int64).max
