"""Copies of evaluation samples, against a loop over all pairs of a pool and an evaluation pool."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.record import read_record
from storage.refs import PairsRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.conditions import PolicyError
from tasks.curation.decide import decide
from tasks.curation.decontaminate import beside, find_contamination, read_ids
from tasks.curation.funnel import Funnel
from tasks.curation.pairs.perceptual import find_perceptual_pairs
from tasks.curation.policy import Policy
from tasks.curation.publish import publish
from tests.tasks.curation.handmade import write_pairs, write_pool, write_signals


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def policy(**rule) -> Policy:
    return Policy.model_validate(
        {
            "name": "p",
            "conditions": {"clip": "clip_score >= 0.28"},
            "decontaminate": {"leak": {"against": ["exam"], "pairs": ["perceptual"], "max_distance": 2, **rule}},
            "duplicates": {"near": {"pairs": ["perceptual"], "max_distance": 4}},
            "splits": {"validation": 0, "test": 0},
        }
    )


def hashed(**codes: int) -> dict[str, dict]:
    return {name: {"phash": code} for name, code in codes.items()}


def found_pairs(warehouse, *pools, max_distance=4) -> tuple[PairsRef, list[SignalRef]]:
    """The perceptual pairs of the first pool beside the others, with the first pool's signals."""
    rows = {}
    refs = []
    for pool, samples in pools:
        refs = write_signals(warehouse, pool, samples)
        rows |= samples
    perceptual = next(ref for ref in refs if ref.signal == "perceptual")
    together = beside(pools[0][0], [pool for pool, _ in pools[1:]])
    return find_perceptual_pairs(together, perceptual, max_distance=max_distance, warehouse=warehouse).ref, refs


CODES = st.dictionaries(st.from_regex(r"[a-z]{1,2}", fullmatch=True), st.integers(0, 63), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(own=CODES, exam=CODES, max_distance=st.integers(0, 4))
def test_the_nearest_evaluation_sample_is_named(tmp_path_factory, own, exam, max_distance):
    warehouse = Warehouse(str(tmp_path_factory.mktemp("w")))
    exam = {f"exam-{name}": code for name, code in exam.items()}
    pools = [
        (write_pool(warehouse, hashed(**codes), name=name), hashed(**codes))
        for name, codes in (("own", own), ("exam", exam))
    ]
    pairs, _ = found_pairs(warehouse, *pools)
    found = find_contamination(
        read_ids([pools[0][0]], warehouse), read_ids([pools[1][0]], warehouse), [pairs],
        max_distance=max_distance, warehouse=warehouse,
    )  # fmt: skip
    expected = []
    for code in own.values():
        near = sorted(((code ^ other).bit_count(), name) for name, other in exam.items())
        expected.append(near[0][1] if near[0][0] <= max_distance else None)
    assert found.to_pylist() == expected


def test_a_copy_is_rejected_with_its_evaluation_sample_and_survives_nothing(warehouse):
    own, exam = hashed(a=0b0, b=0b111, c=0xFF00, d=0b1111), hashed(x=0b1)
    pools = [(write_pool(warehouse, own, name="own"), own), (write_pool(warehouse, exam, name="exam"), exam)]
    pairs, signals = found_pairs(warehouse, *pools)
    pool, evaluation = pools[0][0], [pools[1][0]]
    rules = policy()
    ref = decide(pool, rules, signals, [pairs], evaluation_pools=evaluation, warehouse=warehouse).ref
    rows = [row for shard in pool.shards for row in warehouse.read_table(ref.table(shard)).to_pylist()]
    # a and b are within 2 bits of x; d is near a and b only, so it stays
    assert {row["sample_id"]: (row["kept"], row["failed"], row["contaminated_by"]) for row in rows} == {
        "a": (False, ["leak"], "x"),
        "b": (False, ["leak"], "x"),
        "c": (True, [], None),
        "d": (True, [], None),
    }
    funnel = Funnel.from_dict(read_record(warehouse, ref.record).result)
    [stage] = [stage for stage in funnel.conditions if stage.name == "leak"]
    assert (stage.fails, stage.rule) == (2, "no copy of exam by perceptual within 2")
    snapshot = publish("set", pool, ref, rules, signals, [pairs], evaluation_pools=evaluation, warehouse=warehouse)
    assert not snapshot.cached


def test_a_sample_that_is_itself_in_the_evaluation_set_is_its_own_copy(warehouse):
    own, exam = hashed(a=0b0, b=0xFF00), hashed(b=0xFF00, y=0xFFFF0000)
    pools = [(write_pool(warehouse, own, name="own"), own), (write_pool(warehouse, exam, name="exam"), exam)]
    pairs, _ = found_pairs(warehouse, *pools)
    ids = [read_ids([pool], warehouse) for pool, _ in pools]
    assert find_contamination(*ids, [pairs], max_distance=0, warehouse=warehouse).to_pylist() == [None, "b"]


def test_several_kinds_are_one_rule_and_the_nearest_of_them_counts(warehouse):
    bytes_ = write_pairs(warehouse, "bytes", [("a", "x", 0)])
    near = write_pairs(warehouse, "perceptual", [("a", "w", 2), ("b", "x", 2)])
    ids = pa.chunked_array([["a", "b", "c"]]), pa.chunked_array([["w", "x"]])
    found = find_contamination(*ids, [bytes_, near], max_distance=2, warehouse=warehouse)
    assert found.to_pylist() == ["x", "x", None]


@pytest.mark.parametrize(
    ("rule", "pools", "message"),
    [
        ({}, [], 'decontaminate "leak" names pool exam, which is empty or was not given'),
        ({"pairs": ["bytes"], "max_distance": 0}, ["exam"], "needs pairs of kind bytes"),
        ({"max_distance": 6}, ["exam"], "reaches to distance 6"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_decided(warehouse, rule, pools, message):
    own, exam = hashed(a=0), hashed(x=1)
    given = [(write_pool(warehouse, own, name="own"), own), (write_pool(warehouse, exam, name="exam"), exam)]
    pairs, signals = found_pairs(warehouse, *given)
    with pytest.raises(PolicyError, match=message):
        decide(
            given[0][0], policy(**rule), signals, [pairs], evaluation_pools=[given[1][0]] if pools else [],
            warehouse=warehouse,
        )  # fmt: skip


def test_semantic_and_perceptual_distances_are_not_mixed():
    with pytest.raises(ValueError, match="make it two conditions"):
        policy(pairs=["perceptual", "semantic"])
