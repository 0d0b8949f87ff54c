"""Survivors and groups against a plain loop over every two samples."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.refs import PairsRef
from storage.schema import PAIRS
from storage.warehouse import Warehouse
from tasks.curation.duplicates import Edges, Evidence, Rule, choose_survivors, read_evidence

BITS = 6


def hamming(one: int, other: int) -> int:
    return bin(one ^ other).count("1")


def compact_edges(codes: list[int | None], floor: int, late: set[int]) -> list[tuple[int, int, int]]:
    """Pairs as they are stored: stars of equal codes, one edge between near ones; a late sample links to any member."""
    by_code: dict[int, list[int]] = {}
    for sample, code in enumerate(codes):
        if code is not None:
            by_code.setdefault(code, []).append(sample)
    edges = []
    for members in by_code.values():
        for at, member in enumerate(members[1:], start=1):
            edges.append((members[at - 1 if member in late else 0], member, 0))
    for code, members in by_code.items():
        for other, others in by_code.items():
            if code < other and hamming(code, other) <= floor:
                linked = members[-1] if members[-1] in late else members[0]
                edges.append((min(linked, others[0]), max(linked, others[0]), hamming(code, other)))
    return edges


def evidence_of(count: int, kinds: dict[str, list[tuple[int, int, int]]]) -> Evidence:
    def edges(rows: list[tuple[int, int, int]]) -> Edges:
        columns = np.array(rows, np.float64).reshape(-1, 3)
        return Edges(columns[:, 0].astype(np.int32), columns[:, 1].astype(np.int32), columns[:, 2].astype(np.float32))

    ids = pa.array([f"{i:032x}" for i in range(count)])
    return Evidence(ids, {kind: edges(rows) for kind, rows in kinds.items()})


samples = st.integers(0, 14).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 3), min_size=n, max_size=n),  # bytes
        st.lists(st.one_of(st.none(), st.integers(0, 2)), min_size=n, max_size=n),  # pixels, null if unreadable
        st.lists(st.one_of(st.none(), st.integers(0, 2**BITS - 1)), min_size=n, max_size=n),  # perceptual, null if flat
        st.permutations(range(n)),  # preference
        st.lists(st.booleans(), min_size=n, max_size=n),  # passes all conditions
        st.sets(st.integers(0, max(0, n - 1))),  # came later, so linked to another member than the smallest
    )
)


@settings(max_examples=200, deadline=None)
@given(samples, st.integers(0, 3), st.permutations(range(2)), st.permutations(["perceptual", "bytes"]))
def test_survivors_equal_a_loop_over_all_pairs_of_samples(drawn, max_distance, rule_order, kinds):
    bytes_codes, pixel_codes, near_codes, preference, passes, late = drawn
    count = len(preference)
    rules = [Rule(("bytes", "pixels"), 0), Rule(tuple(kinds), max_distance)]
    rules = [rules[at] for at in rule_order]
    codes = {"bytes": bytes_codes, "pixels": pixel_codes, "perceptual": near_codes}
    evidence = evidence_of(
        count, {kind: compact_edges(c, 3 if kind == "perceptual" else 0, late) for kind, c in codes.items()}
    )
    candidates = [s for s in preference if passes[s]]

    found = choose_survivors(evidence, rules, candidates=np.array(candidates, np.int64))

    def distance(kind: str, one: int, other: int) -> float:
        a, b = codes[kind][one], codes[kind][other]
        if a is None or b is None:
            return np.inf
        return hamming(a, b) if kind == "perceptual" else (0 if a == b else np.inf)

    def join(one: int, other: int) -> tuple[int, float] | None:
        for number, rule in enumerate(rules):
            nearest = min(distance(kind, one, other) for kind in rule.kinds)
            if nearest <= rule.max_distance:
                return number, nearest
        return None

    stands_for: dict[int, tuple[int, int, float]] = {}
    survivors: list[int] = []
    for sample in candidates:
        if sample in stands_for:
            continue
        survivors.append(sample)
        for other in range(count):
            joined = join(sample, other)
            if other != sample and other not in survivors and other not in stands_for and joined:
                stands_for[other] = (sample, *joined)
    for sample in range(count):
        expected = stands_for.get(sample, (-1, -1, np.nan))
        actual = (found.survivor[sample], found.rule[sample], found.distance[sample])
        np.testing.assert_equal(actual, expected)


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
    assert (evidence.kinds["bytes"].left.tolist(), evidence.kinds["bytes"].right.tolist()) == ([2, 0], [3, 3])


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


def test_no_pairs_at_all_are_evidence_too(tmp_path: Path):
    warehouse = Warehouse(str(tmp_path))
    evidence, positions = read_evidence([PairsRef("bytes", "1", ())], sample_ids=ids("a"), warehouse=warehouse)
    assert (len(evidence.ids), evidence.components().tolist(), positions.tolist()) == (0, [], [-1])
