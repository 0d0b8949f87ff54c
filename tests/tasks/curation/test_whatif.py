"""What-if answers against decisions made for real."""

from pathlib import Path

import numpy as np
import pytest

from storage.record import read_record
from storage.refs import PoolRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.conditions import PolicyError
from tasks.curation.decide import decide
from tasks.curation.funnel import Funnel
from tasks.curation.policy import Policy
from tasks.curation.whatif import SWEEP, compare, sweep
from tests.tasks.curation.handmade import write_pairs, write_pool, write_signals

POLICY = Policy.model_validate(
    {
        "name": "p",
        "parameters": {"clip_min": 0.28, "side_min": 200, "share": 0.5},
        "conditions": {
            "clip": "clip_score >= $clip_min",
            "side": "least(width, height) >= $side_min",
            "best": {"top_fraction": "$share", "of": "clip_score"},
        },
        "duplicates": {"exact": ["bytes"]},
        "prefer": ["clip_score desc"],
    }
)

Evidence = tuple[Warehouse, PoolRef, list[SignalRef], dict]


@pytest.fixture
def evidence(tmp_path: Path) -> Evidence:
    rng = np.random.default_rng(0)
    rows = {
        f"s{at:03}": {
            "clip_score": None if at % 17 == 0 else round(float(rng.uniform(0, 1)), 1),
            "width": int(rng.integers(100, 400)),
            "language": str(rng.choice(["en", "de", "fr"])),
        }
        for at in range(120)
    }
    warehouse = Warehouse(str(tmp_path))
    ids = list(rows)
    pool = write_pool(warehouse, *({name: rows[name] for name in ids[begin : begin + 50]} for begin in (0, 50, 100)))
    return warehouse, pool, write_signals(warehouse, pool, rows), rows


def funnel(evidence: Evidence, policy: Policy, pairs=()) -> Funnel:
    warehouse, pool, signals, _ = evidence
    kinds = [write_pairs(warehouse, "bytes", [(*pair, 0) for pair in pairs])]
    ref = decide(pool, policy, signals, kinds, warehouse=warehouse).ref
    return Funnel.from_dict(read_record(warehouse, ref.record).result)


@pytest.mark.parametrize(
    ("parameter", "values", "stage"),
    [("clip_min", [0, 0.3, 0.7], 0), ("side_min", [150, 300], 1), ("share", [0.1, 1], 2)],
)
def test_a_sweep_says_what_deciding_with_each_value_would(evidence, parameter, values, stage):
    warehouse, pool, signals, _ = evidence
    found = sweep(pool, POLICY, parameter, values, signals, warehouse=warehouse)
    assert found.schema.equals(SWEEP)
    for row, value in zip(found.to_pylist(), values, strict=True):
        decided = funnel(evidence, POLICY.with_parameters({parameter: value}))
        condition = decided.conditions[stage]
        assert (row["value"], row["samples"], row["group"]) == (value, 120, None)
        assert row["passing"] == decided.conditions[-1].remaining
        assert (row["fails"], row["fails_alone"]) == (condition.fails, condition.fails_alone)


def test_a_sweep_by_an_expression_adds_a_row_for_each_of_its_values(evidence):
    warehouse, pool, signals, rows = evidence
    found = sweep(pool, POLICY, "side_min", [250], signals, warehouse=warehouse, by="language").to_pylist()
    of = {row["group"]: row for row in found}
    for language in ("en", "de", "fr"):
        own = [row for row in rows.values() if row["language"] == language]
        assert (of[language]["samples"], of[language]["fails"]) == (len(own), sum(row["width"] < 250 for row in own))
    for name in ("samples", "passing", "fails", "fails_alone"):
        assert of[None][name] == sum(of[language][name] for language in ("en", "de", "fr"))


@pytest.mark.parametrize(
    ("parameter", "by", "message"),
    [
        ("clip_mim", None, 'no parameter "clip_mim". Did you mean "clip_min"'),
        ("clip_min", "langage", 'by uses "langage"'),
        ("clip_min", "(SELECT 1)", "by contains a query of its own"),
    ],
)
def test_what_does_not_fit_is_said(evidence, parameter, by, message):
    warehouse, pool, signals, _ = evidence
    with pytest.raises(PolicyError, match=message.replace("(", r"\(")):
        sweep(pool, POLICY, parameter, [0.3], signals, warehouse=warehouse, by=by)


def test_a_comparison_counts_who_keeps_what_and_why_the_other_does_not(evidence):
    warehouse, pool, signals, rows = evidence
    pairs = [write_pairs(warehouse, "bytes", [("s001", "s002", 0), ("s001", "s003", 0)])]
    strict = POLICY.with_parameters({"clip_min": 0.8, "share": 1.0})
    loose = POLICY.with_parameters({"clip_min": 0.1, "share": 1.0, "side_min": 150})
    kept, failed = {}, {}
    for name, policy in (("a", strict), ("b", loose)):
        ref = decide(pool, policy, signals, pairs, warehouse=warehouse).ref
        decided = [row for shard in pool.shards for row in warehouse.read_table(ref.table(shard)).to_pylist()]
        kept[name] = {row["sample_id"] for row in decided if row["kept"]}
        failed[name] = {row["sample_id"]: tuple(row["failed"]) for row in decided}
    found = compare(pool, strict, loose, signals, pairs, warehouse=warehouse, by="language")
    assert (found.kept_a, found.kept_b, found.both) == (len(kept["a"]), len(kept["b"]), len(kept["a"] & kept["b"]))
    only_b = kept["b"] - kept["a"]
    assert sum(found.only_b.values()) == len(only_b)
    assert found.only_b[("clip",)] == sum(failed["a"][name] == ("clip",) for name in only_b)
    both = sum({"clip", "side"} <= set(reasons) for reasons in failed["a"].values())
    assert found.overlap_a["clip", "side"] == found.overlap_a["side", "clip"] == both
    assert found.overlap_a["side", "side"] == sum(reasons == ("side",) for reasons in failed["a"].values())
    for language, samples, by_a, by_b in found.groups:
        own = {name for name, row in rows.items() if row["language"] == language}
        assert (samples, by_a, by_b) == (len(own), len(own & kept["a"]), len(own & kept["b"]))
    assert "| b keeps, a rejects for | samples |" in found.markdown()


def test_a_policy_compared_with_itself_keeps_the_same(evidence):
    warehouse, pool, signals, _ = evidence
    pairs = [write_pairs(warehouse, "bytes", [])]
    found = compare(pool, POLICY, POLICY, signals, pairs, warehouse=warehouse)
    assert (found.only_a, found.only_b, found.groups) == ({}, {}, ())
    assert found.both == found.kept_a == found.kept_b > 0
