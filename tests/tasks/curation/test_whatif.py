"""What-if answers against decisions made for real."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from storage.record import read_record
from storage.refs import PoolRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.conditions import PolicyError
from tasks.curation.decide import decide
from tasks.curation.funnel import Funnel, count_overlap
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


def test_a_comparison_shows_the_largest_of_many_groups_and_keeps_all(evidence):
    warehouse, pool, signals, _ = evidence
    compared = compare(
        pool, POLICY, POLICY, signals, [write_pairs(warehouse, "bytes", [])], warehouse=warehouse, by="key"
    )
    assert len(compared.groups) == 120
    assert compared.markdown().count("| key-s") == 50
    assert "| 70 more | 70 |" in compared.markdown()


def test_a_sweep_tells_the_samples_without_a_group_from_all(evidence):
    warehouse, pool, signals, _ = evidence
    rows = sweep(pool, POLICY, "side_min", [250], signals, warehouse=warehouse, by="nullif(language, 'en')").to_pylist()
    total, *groups = rows
    assert (total["group"], total["of_all"], total["samples"]) == (None, True, 120)
    [ungrouped] = [row for row in groups if row["group"] is None]
    assert not ungrouped["of_all"]
    assert sum(row["samples"] for row in groups) == 120


def test_a_sweep_takes_numpys_numbers_and_none_at_all(evidence):
    warehouse, pool, signals, _ = evidence
    plain = sweep(pool, POLICY, "side_min", [100, 150], signals, warehouse=warehouse)
    assert sweep(pool, POLICY, "side_min", np.arange(100, 200, 50), signals, warehouse=warehouse).equals(plain)
    assert sweep(pool, POLICY, "side_min", [], signals, warehouse=warehouse).equals(SWEEP.empty_table())


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


@pytest.mark.parametrize("rule", ["greedy", "official", "components"])
def test_a_comparison_is_that_of_decisions_with_every_kind_of_rule(tmp_path, rule):
    rng = np.random.default_rng(1)
    rows = {
        f"s{at:03}": {
            "clip_score": round(float(rng.uniform(0, 1)), 1),
            "width": int(rng.integers(100, 400)),
            "language": [None, "en", "de"][at % 3],
            "concepts": [f"c{concept}" for concept in rng.integers(0, 4, at % 3)],
        }
        for at in range(90)
    }
    warehouse = Warehouse(str(tmp_path))
    ids = list(rows)
    pool = write_pool(warehouse, {name: rows[name] for name in ids[:40]}, {name: rows[name] for name in ids[40:]})
    exam = write_pool(warehouse, {"x": {}}, name="exam")
    signals = write_signals(warehouse, pool, rows)
    near = {(ids[at], ids[at + step]): step / 50 for at in range(0, 60, 2) for step in (1, 2)}
    pairs = [
        write_pairs(warehouse, "semantic", [(*pair, distance) for pair, distance in near.items()]),
        write_pairs(warehouse, "bytes", [("s070", "x", 0), ("s070", "s071", 0), ("s080", "s081", 0)]),
    ]
    content = {
        "name": "p",
        "parameters": {"share": 0.9, "near": 0.02, "at_most": 9},
        "conditions": {"side": "width >= 130", "best": {"top_fraction": "$share", "of": "clip_score"}},
        "decontaminate": {"leak": {"against": ["exam"], "pairs": ["bytes"]}},
        "duplicates": {"exact": ["bytes"], "near": {"pairs": ["semantic"], "max_distance": "$near", "rule": rule}},
        "prefer": ["clip_score desc", "width asc"],
        "limits": {
            "few": {"cap_per": "language", "at_most": 15},
            "even": {"balance": "concepts", "at_most": "$at_most"},
        },
    }
    a = Policy.model_validate(content)
    b = a.with_parameters({"share": 0.7, "near": 0.04, "at_most": 5})
    before = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    found = compare(pool, a, b, signals, pairs, evaluation_pools=[exam], warehouse=warehouse)
    assert sorted(file for file in tmp_path.rglob("*") if file.is_file()) == before
    decided = []
    for policy in (a, b):
        ref = decide(pool, policy, signals, pairs, evaluation_pools=[exam], warehouse=warehouse).ref
        decided.append([row for shard in pool.shards for row in warehouse.read_table(ref.table(shard)).to_pylist()])
    stages = {reason for rows in decided for row in rows for reason in (*row["failed"], row["duplicate_rule"])}
    assert stages >= {"side", "best", "leak", "exact", "near", "few", "even"}
    for keeping, rejecting, only, overlap in (
        (decided[0], decided[1], found.only_a, found.overlap_b),
        (decided[1], decided[0], found.only_b, found.overlap_a),
    ):
        lost = [there for here, there in zip(keeping, rejecting, strict=True) if here["kept"] and not there["kept"]]
        assert only == Counter(tuple(row["failed"]) or (f"duplicate: {row['duplicate_rule']}",) for row in lost)
        assert overlap == count_overlap(Counter(tuple(row["failed"]) for row in rejecting))
    assert found.both == sum(x["kept"] and y["kept"] for x, y in zip(*decided, strict=True))
