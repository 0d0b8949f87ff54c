"""Duplicates: who survives among samples that pairs join.

What pairs join is in `duplicate_joins`; here the best samples of a policy take their duplicates, by one of three rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from storage.refs import PairsRef
from storage.warehouse import Warehouse
from tasks.curation.duplicate_joins import Edges, Evidence, Rule, join_by_rules
from tasks.curation.pairs.compact import read_pairs


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
    tables = {ref.kind: read_pairs(ref, warehouse, ids=sample_ids) for ref in pairs}
    ends = [table[name] for table in tables.values() for name in ("left_id", "right_id")]
    ids = pc.unique(pa.chunked_array([chunk for column in ends for chunk in column.chunks], pa.string()))
    ids = ids.take(pc.sort_indices(ids))
    kinds = {}
    for kind, table in tables.items():
        left, right = (np.asarray(pc.index_in(table[name], value_set=ids)) for name in ("left_id", "right_id"))
        kinds[kind] = Edges(left.astype(np.int32), right.astype(np.int32), np.asarray(table["distance"]))
    evidence = Evidence(ids, kinds)
    return evidence, evidence.find(sample_ids)


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
    survivor = [FREE] * len(evidence.ids)
    named_by = [-1] * len(survivor)
    distances = [float("nan")] * len(survivor)
    for best in candidates.tolist():
        is_taken = survivor[best] != FREE
        stands = survivor[best] if is_taken else best
        if not is_taken:
            survivor[best] = SURVIVES
        for number, rule in enumerate(rules):
            if is_taken and rule.method != "official":
                continue
            for sample, distance in joined[number].take_around(best):
                if survivor[sample] == FREE:
                    survivor[sample], named_by[sample], distances[sample] = stands, number, distance
    return Survivors(
        np.maximum(np.array(survivor, np.int32), -1), np.array(named_by, np.int32), np.array(distances, np.float32)
    )


FREE, SURVIVES = -1, -2
