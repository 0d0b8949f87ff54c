"""What changed between two snapshots of small pools written by hand, and the reasons given."""

from pathlib import Path
from typing import Any

import pytest

from storage.catalog import connect
from storage.refs import SnapshotRef
from storage.schema import DIFFERENCE
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.difference import difference, difference_markdown
from tasks.curation.policy import Policy
from tasks.curation.publish import publish
from tests.tasks.curation.handmade import write_pairs, write_pool, write_signals


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def curate(
    warehouse, *shards, least=0.2, parameters=None, pairs=(), exams=(), fingerprint="1", **words: Any
) -> SnapshotRef:
    """Publish shards by a policy that `words` add to; evaluation sets, if any, are in the pool `exam`."""
    leak = {"leak": {"against": ["exam"], "pairs": ["bytes"]}} if exams else {}
    conditions = {"clip": "clip_score >= $least", **words.pop("conditions", {})}
    policy = Policy.model_validate(
        {
            "name": "p",
            "parameters": {"least": least, **(parameters or {})},
            "conditions": conditions,
            "decontaminate": leak,
            "duplicates": {"exact": ["bytes"]},
            "prefer": ["clip_score desc"],
            **words,
        }
    )
    pool = write_pool(warehouse, *shards)
    held_out = [write_pool(warehouse, *exams, name="exam")] if exams else []
    rows = {sample: row for shard in shards for sample, row in shard.items()}
    signals = write_signals(warehouse, pool, rows, fingerprint_=fingerprint)
    evidence = [write_pairs(warehouse, "bytes", [(*pair, 0) for pair in pairs])]
    decisions = decide(pool, policy, signals, evidence, evaluation_pools=held_out, warehouse=warehouse).ref
    return publish(
        "set", pool, decisions, policy, signals, evidence, evaluation_pools=held_out, warehouse=warehouse
    ).ref


def changes(warehouse, snapshot: SnapshotRef) -> dict[str, tuple[Any, ...]]:
    table = warehouse.read_table(difference(snapshot, warehouse=warehouse).ref)
    assert table.schema.equals(DIFFERENCE)
    return {row["sample_id"]: (row["change"], row["cause"], row["because"]) for row in table.to_pylist()}


def test_a_first_snapshot_adds_all_that_it_keeps(warehouse):
    first = curate(warehouse, {"a": {}, "low": {"clip_score": 0.1}})
    assert changes(warehouse, first) == {"a": ("added", "new_sample", "new sample")}


def test_a_changed_threshold_is_named_with_both_values(warehouse):
    shard = {"a": {}, "b": {"clip_score": 0.25}, "c": {"clip_score": 0.1}}
    curate(warehouse, shard)
    second = curate(warehouse, shard, least=0.28)
    was_and_is = "clip: clip_score >= $least, $least = 0.2 became clip_score >= $least, $least = 0.28"
    assert changes(warehouse, second) == {"b": ("removed", "condition", was_and_is)}
    assert "| removed | condition | clip: clip_score" in difference_markdown(second, warehouse=warehouse)


def test_a_condition_that_comes_or_goes_is_said(warehouse):
    shard = {"a": {}, "small": {"width": 100}}
    curate(warehouse, shard, conditions={"side": "width >= 200"})
    gone = curate(warehouse, shard)
    assert changes(warehouse, gone) == {"small": ("added", "condition", "side: no longer asked (width >= 200)")}
    back = curate(warehouse, shard, conditions={"side": "width >= 200"})
    assert changes(warehouse, back) == {"small": ("removed", "condition", "side: newly asked (width >= 200)")}


def test_a_better_copy_that_arrives_takes_the_place_of_the_old_one(warehouse):
    curate(warehouse, {"a": {}})
    second = curate(warehouse, {"a": {}}, {"b": {"clip_score": 0.5}}, pairs=[("a", "b")])
    assert changes(warehouse, second) == {
        "a": ("removed", "duplicate", "exact: its survivor is new"),
        "b": ("added", "new_sample", "new sample"),
    }


def test_a_duplicate_comes_back_when_its_survivor_is_rejected(warehouse):
    shard = {"a": {"width": 100, "clip_score": 0.5}, "b": {}}
    curate(warehouse, shard, pairs=[("a", "b")])
    second = curate(warehouse, shard, pairs=[("a", "b")], conditions={"side": "width >= 200"})
    assert changes(warehouse, second) == {
        "a": ("removed", "condition", "side: newly asked (width >= 200)"),
        "b": ("added", "duplicate", "exact: its survivor was removed"),
    }


def test_another_preference_is_named_as_the_reason(warehouse):
    shard = {"a": {"clip_score": 0.5, "width": 300}, "b": {"width": 400}}
    curate(warehouse, shard, pairs=[("a", "b")])
    second = curate(warehouse, shard, pairs=[("a", "b")], prefer=["width desc"])
    because = "exact: prefer clip_score desc became width desc"
    assert changes(warehouse, second)["a"] == ("removed", "duplicate", because)


def test_an_evaluation_set_that_grows_is_named_as_the_reason(warehouse):
    shard = {"a": {}, "b": {}}
    curate(warehouse, shard, pairs=[("a", "x")], exams=[{"y": {}}])
    second = curate(warehouse, shard, pairs=[("a", "x")], exams=[{"y": {}}, {"x": {}}])
    assert changes(warehouse, second) == {"a": ("removed", "condition", "leak: the evaluation sets changed")}


def test_a_parameter_whose_name_begins_like_anothers_is_not_taken_for_it(warehouse):
    shard, worse = {"a": {"width": 300}}, {"a": {"width": 100}}
    side = {"side": "width >= $least_side", "words": "caption_words >= $least"}
    curate(warehouse, shard, least=0.2, conditions=side, parameters={"least_side": 200})
    second = curate(warehouse, worse, least=0.3, conditions=side, parameters={"least_side": 200}, fingerprint="2")
    assert changes(warehouse, second)["a"][2].endswith("measured anew")


def test_samples_whose_shard_left_the_pool_are_said_to_have_left(warehouse):
    curate(warehouse, {"a": {}}, {"b": {}})
    assert changes(warehouse, curate(warehouse, {"a": {}})) == {"b": ("removed", "left_pool", "left pool")}


def test_a_difference_is_computed_once_and_lies_in_the_catalog(warehouse):
    snapshot = curate(warehouse, {"a": {}})
    assert not difference(snapshot, warehouse=warehouse).cached
    assert difference(snapshot, warehouse=warehouse).cached
    with connect(warehouse) as catalog:
        rows = catalog.execute("SELECT dataset, snapshot, sample_id, change FROM differences").fetchall()
    assert rows == [("set", 1, "a", "added")]


def test_the_same_samples_for_other_reasons_are_no_difference(warehouse):
    curate(warehouse, {"a": {}})
    second = curate(warehouse, {"a": {}}, least=0.22)
    assert changes(warehouse, second) == {}
    assert "Nothing was added or removed" in difference_markdown(second, warehouse=warehouse)
