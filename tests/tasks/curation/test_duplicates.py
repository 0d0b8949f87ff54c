"""Survivors and groups against a plain loop over every two samples."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.refs import PairsRef
from storage.schema import PAIRS
from storage.warehouse import Warehouse
from tasks.curation.duplicate_joins import Edges, Evidence, Rule
from tasks.curation.duplicates import choose_survivors, read_evidence

BITS = 6


def hamming(one: int, other: int) -> int:
    return bin(one ^ other).count("1")


def angle(one: int, other: int) -> float:
    return abs(one - other) / 64


Distance = Callable[[int, int], float]


def compact_edges(
    codes: list[int | None], floor: float, late: set[int], distance: Distance = hamming
) -> list[tuple[int, int, float]]:
    """Pairs as they are stored: stars of equal codes, one edge between near ones; a late sample links to any member."""
    by_code: dict[int, list[int]] = {}
    for sample, code in enumerate(codes):
        if code is not None:
            by_code.setdefault(code, []).append(sample)
    edges: list[tuple[int, int, float]] = []
    for members in by_code.values():
        for at, member in enumerate(members[1:], start=1):
            edges.append((members[at - 1 if member in late else 0], member, 0))
    for code, members in by_code.items():
        for other, others in by_code.items():
            if code < other and distance(code, other) <= floor:
                linked = members[-1] if members[-1] in late else members[0]
                edges.append((min(linked, others[0]), max(linked, others[0]), distance(code, other)))
    return edges


def evidence_of(count: int, kinds: dict[str, list[tuple[int, int, float]]]) -> Evidence:
    def edges(rows: list[tuple[int, int, float]]) -> Edges:
        columns = np.array(rows, np.float64).reshape(-1, 3)
        return Edges(columns[:, 0].astype(np.int32), columns[:, 1].astype(np.int32), columns[:, 2].astype(np.float32))

    ids = pa.array([f"{i:032x}" for i in range(count)])
    return Evidence(ids, {kind: edges(rows) for kind, rows in kinds.items()})


@dataclass(frozen=True)
class Drawn:
    """A few samples: their codes by kind, who is preferred and who passes; all pairs of them, and what is stored."""

    codes: dict[str, list[int | None]]
    preference: list[int]
    passes: list[bool]
    late: set[int]

    @property
    def candidates(self) -> list[int]:
        return [s for s in self.preference if self.passes[s]]

    @property
    def evidence(self) -> Evidence:
        floors: dict[str, tuple[float, Distance]] = {"perceptual": (3, hamming), "semantic": (3 / 64, angle)}
        stored = {
            k: compact_edges(c, f, self.late, d)
            for k, c in self.codes.items()
            for f, d in [floors.get(k, (0, hamming))]
        }
        return evidence_of(len(self.preference), stored)

    def distance(self, kind: str, one: int, other: int) -> float:
        a, b = self.codes[kind][one], self.codes[kind][other]
        if a is None or b is None:
            return np.inf
        return hamming(a, b) if kind == "perceptual" else angle(a, b) if kind == "semantic" else 0 if a == b else np.inf

    def joined(self, rule: Rule, one: int, other: int) -> float | None:
        """The oracle's pair: the smallest distance of two samples by a rule, or None."""
        nearest = min(self.distance(kind, one, other) for kind in rule.kinds)
        is_confirmed = rule.confirm is None or self.distance("semantic", one, other) <= rule.confirm
        return nearest if nearest <= rule.max_distance and is_confirmed and one != other else None


def drawn(n: int) -> st.SearchStrategy[Drawn]:
    def codes(most: int, *, null: bool) -> st.SearchStrategy[list[int | None]]:
        code = st.one_of(st.none(), st.integers(0, most)) if null else st.integers(0, most)
        return st.lists(code, min_size=n, max_size=n)

    kinds = {
        "bytes": codes(3, null=False),
        "pixels": codes(2, null=True),  # null if unreadable
        "perceptual": codes(2**BITS - 1, null=True),  # null if flat
        "semantic": codes(9, null=True),
    }
    return st.builds(
        Drawn,
        st.fixed_dictionaries(kinds),
        st.permutations(range(n)),
        st.lists(st.booleans(), min_size=n, max_size=n),
        st.sets(st.integers(0, max(0, n - 1))),  # came later, so linked to another member than the smallest
    )


samples = st.integers(0, 14).flatmap(drawn)
confirmations = st.one_of(st.none(), st.integers(0, 3).map(lambda steps: steps / 64))
methods = st.sampled_from(["greedy", "official"])
rules_of = st.tuples(
    st.builds(Rule, st.just(("bytes", "pixels")), st.just(0), methods),
    st.builds(Rule, st.permutations(["perceptual", "bytes"]).map(tuple), st.integers(0, 3), methods, confirmations),
    st.builds(Rule, st.just(("semantic",)), st.integers(0, 3).map(lambda steps: steps / 64), methods),
).flatmap(st.permutations)


@settings(max_examples=120, deadline=None)
@given(samples, rules_of)
def test_survivors_equal_a_loop_over_all_pairs_of_samples(drawn, rules):
    found = choose_survivors(drawn.evidence, rules, candidates=np.array(drawn.candidates, np.int64))

    count = len(drawn.preference)
    stands_for: dict[int, tuple[int, int, float]] = {}
    survivors: list[int] = []
    for sample in drawn.candidates:
        takes = [(number, rule) for number, rule in enumerate(rules) if rule.method == "official"]
        if sample not in stands_for:
            survivors.append(sample)
            takes = list(enumerate(rules))
        survivor = stands_for.get(sample, (sample,))[0]
        for number, rule in takes:
            for other in range(count):
                distance = drawn.joined(rule, sample, other)
                if other not in survivors and other not in stands_for and distance is not None:
                    stands_for[other] = (survivor, number, distance)
    for sample in range(count):
        expected = stands_for.get(sample, (-1, -1, np.nan))
        actual = (found.survivor[sample], found.rule[sample], found.distance[sample])
        np.testing.assert_allclose(actual, expected, atol=1e-6)


@settings(max_examples=120, deadline=None)
@given(samples, st.permutations(["perceptual", "bytes"]), st.integers(0, 3), confirmations)
def test_of_each_component_of_candidates_the_best_survives(drawn, kinds, max_distance, confirm):
    rule = Rule(tuple(kinds), max_distance, "components", confirm)
    found = choose_survivors(drawn.evidence, [rule], candidates=np.array(drawn.candidates, np.int64))

    component: dict[int, int] = {}  # the best candidate that a candidate leads to
    for best in drawn.candidates:
        reached = [] if best in component else [best]
        for sample in reached:
            component[sample] = best
            reached += [s for s in drawn.candidates if s not in reached and drawn.joined(rule, sample, s) is not None]
    for sample in range(len(drawn.preference)):
        near = {s: d for s in drawn.candidates if (d := drawn.joined(rule, sample, s)) is not None}
        survivor, distance = found.survivor[sample], found.distance[sample]
        if component.get(sample) == sample or not near:
            assert (survivor, found.rule[sample], np.isnan(distance)) == (-1, -1, True)
        else:
            np.testing.assert_allclose(distance, min(near.values()), atol=1e-6)
            nearest = {component[s] for s, d in near.items() if d <= min(near.values()) + 1e-6}
            assert survivor in (nearest if sample not in component else {component[sample]})


@settings(max_examples=100, deadline=None)
@given(samples, rules_of, st.integers(0, 2))
def test_whatever_the_rules_a_survivor_is_a_candidate_that_stays(drawn, rules, place):
    rules = [replace(rule, method="components") if at == place else rule for at, rule in enumerate(rules)]
    found = choose_survivors(drawn.evidence, rules, candidates=np.array(drawn.candidates, np.int64))
    taken = np.flatnonzero(found.survivor >= 0)
    assert set(found.survivor[taken].tolist()) <= set(drawn.candidates)
    assert (found.survivor[found.survivor[taken]] == -1).all()
    assert (found.rule[taken] >= 0).all()


CHAIN = {"semantic": [(0, 1, 0.05), (1, 2, 0.05)]}  # a~b, b~c, and a is not near c


@pytest.mark.parametrize(
    ("order", "method", "expected"),
    [
        ("abc", "greedy", [-1, 0, -1]),
        ("abc", "official", [-1, 0, 0]),
        ("abc", "components", [-1, 0, 0]),
        ("bac", "greedy", [1, -1, 1]),
        ("bac", "official", [1, -1, 1]),
        ("bac", "components", [1, -1, 1]),
        ("acb", "greedy", [-1, 0, -1]),
        ("acb", "official", [-1, 0, -1]),
        ("acb", "components", [-1, 0, 0]),
    ],
)
def test_a_chain_of_three_goes_by_the_rule_and_the_order(order, method, expected):
    candidates = np.array(["abc".index(sample) for sample in order])
    found = choose_survivors(evidence_of(3, CHAIN), [Rule(("semantic",), 0.06, method)], candidates=candidates)
    assert found.survivor.tolist() == expected
    assert set(found.distance[found.survivor >= 0].tolist()) == {np.float32(0.05)}


@pytest.mark.parametrize("seed", range(5))
def test_official_keeps_what_semdedups_code_keeps(seed):
    # advance_semdedup.py: the largest similarity to any earlier row; rows where it exceeds 1 - eps go
    vectors = np.random.default_rng(seed).normal(size=(60, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    kept = np.triu(similarity, 1).max(axis=0) <= 1 - 0.05
    left, right = np.nonzero(np.triu(similarity > 0.8, 1))
    pairs = [(int(i), int(j), 1 - similarity[i, j]) for i, j in zip(left, right, strict=True)]
    rules = [Rule(("semantic",), 0.05, "official")]
    found = choose_survivors(evidence_of(60, {"semantic": pairs}), rules, candidates=np.arange(60))
    assert ((found.survivor == -1) == kept).all()
    assert 5 < kept.sum() < 55


def test_samples_that_pass_no_condition_neither_bridge_nor_remove():
    for method in ("greedy", "official", "components"):
        rules = [Rule(("semantic",), 0.06, method)]
        found = choose_survivors(evidence_of(3, CHAIN), rules, candidates=np.array([0, 2]))
        assert found.survivor.tolist() == [-1, 0, -1], method


def test_far_hashes_count_only_where_embeddings_confirm_them():
    kinds = {"perceptual": [(0, 1, 8), (0, 2, 8), (3, 4, 0)], "semantic": [(0, 1, 0.02), (0, 2, 0.09)]}
    rules = [Rule(("perceptual",), 10, confirm=0.05)]
    found = choose_survivors(evidence_of(5, kinds), rules, candidates=np.arange(5))
    assert (found.survivor.tolist(), found.distance[1]) == ([-1, 0, -1, -1, -1], 8)


def test_three_hundred_thousand_equal_images_take_seconds():
    count = 300_000
    star = Edges(np.zeros(count - 1, np.int32), np.arange(1, count, dtype=np.int32), np.zeros(count - 1, np.float32))
    evidence = Evidence(pa.array([f"{i:032x}" for i in range(count)]), {"bytes": star, "perceptual": star})
    began = time.perf_counter()
    found = choose_survivors(
        evidence,
        [Rule(("bytes",), 0), Rule(("perceptual",), 4)],
        candidates=np.arange(count)[::-1],
    )
    assert time.perf_counter() - began < 15
    assert (found.survivor[:-1] == count - 1).all()
    assert found.survivor[-1] == -1


def test_components_lead_to_the_smallest_id_over_all_kinds():
    evidence = evidence_of(6, {"bytes": [(3, 5, 0)], "perceptual": [(1, 3, 2), (2, 4, 4)]})
    assert evidence.components().tolist() == [0, 1, 2, 1, 2, 1]


def test_components_leave_out_pairs_beyond_a_kinds_reach():
    evidence = evidence_of(5, {"semantic": [(0, 1, 0.01), (1, 2, 0.05)], "perceptual": [(3, 4, 9)]})
    assert evidence.components({"semantic": 0.02}).tolist() == [0, 0, 2, 3, 3]
    assert evidence.components({"perceptual": 4}).tolist() == [0, 0, 0, 3, 4]


def pairs_of(warehouse: Warehouse, kind: str, *tables: list[tuple[str, str, float]]) -> PairsRef:
    paths = []
    for at, pairs in enumerate(tables):
        rows = [dict(zip(PAIRS.names, pair, strict=True)) for pair in pairs]
        paths.append(f"pairs/{kind}@1/{at}.parquet")
        warehouse.write_table(paths[-1], pa.Table.from_pylist(rows, schema=PAIRS))
    return PairsRef(kind, "1", tuple(paths))


def ids(text: str) -> pa.ChunkedArray:
    return pa.chunked_array([list(text)], pa.string())


def test_evidence_is_read_from_several_tables_with_the_places_of_the_pools_samples(tmp_path: Path):
    warehouse = Warehouse(str(tmp_path))
    pairs = [
        pairs_of(warehouse, "bytes", [("c", "d", 0)], [("a", "d", 0)]),
        pairs_of(warehouse, "perceptual", [("b", "c", 2)]),
    ]
    evidence, positions = read_evidence(pairs, sample_ids=ids("dxabc"), warehouse=warehouse)
    assert evidence.ids.to_pylist() == ["a", "b", "c", "d"]
    assert positions.tolist() == [3, -1, 0, 1, 2]
    assert (evidence.kinds["bytes"].left.tolist(), evidence.kinds["bytes"].right.tolist()) == ([0, 0], [2, 3])


def test_samples_outside_the_pool_are_no_evidence_but_what_they_join_stays_joined(tmp_path: Path):
    warehouse = Warehouse(str(tmp_path))
    pairs = [
        pairs_of(warehouse, "bytes", [("a", "c", 0), ("a", "d", 0)]),
        pairs_of(warehouse, "pixels", [("a", "e", 0)]),
        pairs_of(warehouse, "perceptual", [("a", "c", 0), ("b", "e", 0), ("a", "b", 3), ("a", "f", 4)]),
    ]
    evidence, _ = read_evidence(pairs, sample_ids=ids("cde"), warehouse=warehouse)
    found = {
        kind: [
            (evidence.ids[a].as_py(), evidence.ids[b].as_py(), d)
            for a, b, d in zip(e.left, e.right, e.distance, strict=True)
        ]
        for kind, e in evidence.kinds.items()
    }
    assert found == {"bytes": [("c", "d", 0)], "pixels": [], "perceptual": [("c", "e", 3)]}


def test_samples_that_left_the_pool_bridge_no_groups(tmp_path: Path):
    warehouse = Warehouse(str(tmp_path))
    pairs = [pairs_of(warehouse, "semantic", [("a", "x", 0.01), ("b", "x", 0.01), ("c", "d", 0.01)])]
    evidence, positions = read_evidence(pairs, sample_ids=ids("abcd"), warehouse=warehouse)
    assert evidence.ids.to_pylist() == ["c", "d"]
    assert positions.tolist() == [-1, -1, 0, 1]
    assert evidence.components().tolist() == [0, 0]


def test_no_pairs_at_all_are_evidence_too(tmp_path: Path):
    warehouse = Warehouse(str(tmp_path))
    evidence, positions = read_evidence([PairsRef("bytes", "1", ())], sample_ids=ids("a"), warehouse=warehouse)
    assert (len(evidence.ids), evidence.components().tolist(), positions.tolist()) == (0, [], [-1])
