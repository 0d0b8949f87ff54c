"""Decisions over small pools written by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.record import read_record
from storage.schema import DECISIONS
from storage.warehouse import Warehouse
from tasks.curation.columns import EvidenceError
from tasks.curation.conditions import PolicyError
from tasks.curation.decide import decide
from tasks.curation.funnel import Funnel
from tasks.curation.pairs.perceptual import find_perceptual_pairs
from tasks.curation.policy import Policy
from tests.tasks.curation.handmade import files, write_pairs, write_pool, write_signals


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def policy(**fields) -> Policy:
    return Policy.model_validate({"name": "p", **fields})


def run(warehouse, shards, a_policy, pairs=()):
    """Decide, and return the decisions by sample id, with the record."""
    pool = write_pool(warehouse, *shards)
    rows = {sample: row for shard in shards for sample, row in shard.items()}
    outcome = decide(pool, a_policy, write_signals(warehouse, pool, rows), pairs, warehouse=warehouse)
    tables = [warehouse.read_table(outcome.ref.table(shard)) for shard in pool.shards]
    assert all(table.schema.equals(DECISIONS) for table in tables)
    return {row["sample_id"]: row for row in pa.concat_tables(tables).to_pylist()}, outcome


def test_every_failed_condition_is_named_in_the_policys_order(warehouse):
    decisions, _ = run(
        warehouse,
        [{"good": {}, "small": {"width": 10, "height": 10}, "both": {"width": 10, "language": "de"}}],
        policy(conditions={"english": "language = 'en'", "side": "least(width, height) >= 200"}),
    )
    assert {k: (v["kept"], v["failed"]) for k, v in decisions.items()} == {
        "good": (True, []),
        "small": (False, ["side"]),
        "both": (False, ["english", "side"]),
    }


def test_null_and_nan_fail(warehouse):
    decisions, _ = run(
        warehouse,
        [{"null": {"clip_score": None}, "nan": {"clip_score": float("nan")}, "low": {"clip_score": 0.1}, "ok": {}}],
        policy(conditions={"clip": "clip_score >= 0.28", "odd": "not (clip_score < 0.2)"}),
    )
    assert {k: v["failed"] for k, v in decisions.items()} == {
        "null": ["clip", "odd"],
        "nan": ["clip", "odd"],
        "low": ["clip", "odd"],
        "ok": [],
    }


@pytest.mark.parametrize(
    "sql", ["0 * width / height >= 0.5", "width / height > 0.5", "width // height = 1", "width % height < 9"]
)
def test_a_division_by_zero_fails_as_null_does(warehouse, sql):
    rows = {"zero": {"width": 3, "height": 0}}
    decisions, _ = run(warehouse, [rows], policy(conditions={"ratio": sql}))
    assert decisions["zero"]["failed"] == ["ratio"]


def test_columns_of_the_sample_itself_can_be_used(warehouse):
    decisions, _ = run(
        warehouse,
        [{"a": {"caption": "a red dog", "metadata": '{"license": "cc0"}'}, "b": {"caption": "a blue dog"}}],
        policy(conditions={"red": "caption like '%red%'", "free": "metadata->>'license' = 'cc0'"}),
    )
    assert {k: v["failed"] for k, v in decisions.items()} == {"a": [], "b": ["red", "free"]}


def test_a_parameter_compares_like_the_same_number_in_the_sql(warehouse):
    # 0.7 as 32 bits is a little less than 0.7 as 64 bits, and must still reach the threshold it was given
    conditions = {"literal": "clip_score >= 0.7", "parameter": "clip_score >= $least"}
    decisions, _ = run(
        warehouse, [{"a": {"clip_score": 0.7}}], policy(conditions=conditions, parameters={"least": 0.7})
    )
    assert decisions["a"]["kept"]


def datacomp_fraction(scores: list[float], fraction: float) -> set[int]:
    """DataComp, `baselines/apply_filter.py`: sort all scores downwards, take the one at int(N·f), keep >=."""
    threshold = np.sort(scores)[::-1][int(len(scores) * fraction)]
    return {at for at, score in enumerate(scores) if score >= threshold}


@pytest.mark.parametrize("fraction", [0.1, 0.29, 0.3, 0.5, 0.99])
def test_a_top_fraction_is_datacomps_over_the_whole_pool_ties_kept(warehouse, fraction):
    scores = np.round(np.random.default_rng(0).normal(0.25, 0.05, 100), 2).astype(np.float32).tolist()
    rows = {f"s{at:03}": {"clip_score": score} for at, score in enumerate(scores)}
    shards = [dict(list(rows.items())[begin : begin + 30]) for begin in range(0, 100, 30)]
    decisions, _ = run(
        warehouse,
        shards,
        policy(conditions={"clip": {"top_fraction": "$f", "of": "clip_score"}}, parameters={"f": fraction}),
    )
    kept = {sample for sample, decision in decisions.items() if decision["kept"]}
    assert kept == {f"s{at:03}" for at in datacomp_fraction(scores, fraction)}


def test_a_top_fraction_ranks_by_whole_numbers_beyond_doubles(warehouse):
    rows = {f"s{at}": {"phash": value} for at, value in enumerate([2**64 - 1, 2**63, 2**53 + 1, 7])}
    top = {"half": {"top_fraction": 0.25, "of": "phash"}}
    assert kept(run(warehouse, [rows], policy(conditions=top))) == {"s0", "s1"}


def test_a_top_fraction_counts_null_scores_in_the_pool_but_never_keeps_them(warehouse):
    rows = {"a": {"clip_score": 0.4}, "b": {"clip_score": 0.3}, "c": {"clip_score": None}, "d": {"clip_score": None}}
    # int(4 · 0.25) = 1: the second best is the threshold; with the two nulls left out it would be the best
    clip = {"top_fraction": 0.25, "of": "clip_score"}
    assert kept(run(warehouse, [rows], policy(conditions={"clip": clip}))) == {"a", "b"}
    assert kept(run(warehouse, [rows], policy(conditions={"clip": {**clip, "top_fraction": 1}}))) == {"a", "b"}


def kept(result) -> set[str]:
    return {sample for sample, decision in result[0].items() if decision["kept"]}


DEDUPLICATE = {"exact": ["bytes", "pixels"], "near": {"pairs": ["perceptual"], "max_distance": 4}}


def test_the_preferred_copy_survives_and_stands_for_the_others(warehouse):
    pairs = [
        write_pairs(warehouse, "bytes", [("a", "b", 0)]),
        write_pairs(warehouse, "pixels", []),
        write_pairs(warehouse, "perceptual", [("a", "c", 4), ("a", "d", 6)]),
    ]
    decisions, _ = run(
        warehouse,
        [{"a": {"clip_score": 0.3}, "b": {"clip_score": 0.4}}, {"c": {"clip_score": 0.35}, "d": {}}],
        policy(duplicates=DEDUPLICATE, prefer=["clip_score desc"]),
        pairs,
    )
    assert [decisions[k]["kept"] for k in "abcd"] == [False, True, True, True]  # c is near a only, and d too far
    a = decisions["a"]
    assert (a["failed"], a["duplicate_of"], a["duplicate_rule"], a["duplicate_distance"]) == ([], "b", "exact", 0.0)


def test_a_failing_sample_never_survives_but_names_its_survivor(warehouse):
    pairs = [write_pairs(warehouse, "bytes", [("a", "b", 0), ("a", "c", 0)])]
    decisions, _ = run(
        warehouse,
        [{"a": {"clip_score": 0.9, "language": "de"}, "b": {"clip_score": 0.3}, "c": {"clip_score": 0.2}}],
        policy(
            conditions={"english": "language = 'en'"},
            duplicates={"exact": ["bytes"]},
            prefer=["clip_score desc"],
        ),
        pairs,
    )
    assert {k: (v["kept"], v["failed"], v["duplicate_of"]) for k, v in decisions.items()} == {
        "a": (False, ["english"], "b"),
        "b": (True, [], None),
        "c": (False, [], "b"),
    }


def test_preferences_decide_in_order_missing_values_lose_and_ties_go_to_the_smaller_id(warehouse):
    pairs = [write_pairs(warehouse, "bytes", [("a", "b", 0), ("c", "d", 0), ("e", "f", 0), ("g", "h", 0)])]
    rows = {
        "a": {"clip_score": 0.3, "width": 100},
        "b": {"clip_score": 0.3, "width": 200},  # equal score, larger
        "c": {"clip_score": None},
        "d": {"clip_score": -0.5},
        "e": {"file_bytes": 10},
        "f": {"file_bytes": 5},  # smaller file
        "g": {},
        "h": {},
    }
    a_policy = policy(
        duplicates={"exact": ["bytes"]}, prefer=["clip_score desc", "width * height desc", "file_bytes asc"]
    )
    assert kept(run(warehouse, [rows], a_policy, pairs)) == {"b", "d", "f", "g"}


def test_the_three_rules_and_a_confirmation_reach_the_decisions_and_the_funnel(warehouse):
    pairs = [
        write_pairs(warehouse, "semantic", [("a", "b", 0.02), ("b", "c", 0.03), ("d", "e", 0.05)]),
        write_pairs(warehouse, "perceptual", [("c", "d", 8), ("d", "e", 8)]),
    ]
    rows = {"a": {"clip_score": 0.5}, "b": {"clip_score": 0.4}, "c": {}, "d": {}, "e": {}}
    texts = {}
    expected = {"greedy": "acd", "official": "ad", "components": "ad"}
    for rule, left in expected.items():
        near = {"pairs": ["semantic"], "max_distance": 0.04, "rule": rule}
        far = {"pairs": ["perceptual"], "max_distance": 10, "confirm": 0.06}
        a_policy = policy(duplicates={"near": near, "far": far}, prefer=["clip_score desc"])
        result = run(warehouse, [rows], a_policy, pairs)
        assert kept(result) == set(left), rule
        stages = Funnel.from_dict(read_record(warehouse, result[1].ref.record).result).duplicates
        texts[rule] = [stage.rule for stage in stages]
    assert texts["greedy"] == ["semantic within 0.04", "perceptual within 10, embeddings within 0.06"]
    assert texts["official"][0] == "semantic within 0.04, official"


def test_the_least_typical_of_its_cluster_survives_where_hard_ones_are_preferred(warehouse):
    pairs = [write_pairs(warehouse, "semantic", [("a", "b", 0.02), ("b", "c", 0.02), ("a", "c", 0.02)])]
    rows = {"a": {"centroid_distance": 0.2}, "b": {"centroid_distance": 0.5}, "c": {"centroid_distance": 0.1}}
    rules = {"near": {"pairs": ["semantic"], "max_distance": 0.04}}
    assert kept(run(warehouse, [rows], policy(duplicates=rules, prefer=["hard"]), pairs)) == {"b"}
    assert kept(run(warehouse, [rows], policy(duplicates=rules, prefer=["easy"]), pairs)) == {"c"}


def test_a_confirmation_without_semantic_pairs_is_refused(warehouse):
    far = {"pairs": ["perceptual"], "max_distance": 10, "confirm": 0.06}
    with pytest.raises(PolicyError, match=r'"far" needs pairs of kind semantic, .* Kinds at hand: perceptual'):
        run(warehouse, [{"a": {}}], policy(duplicates={"far": far}), [write_pairs(warehouse, "perceptual", [])])


def test_pairs_with_samples_of_no_shard_join_but_do_not_count(warehouse):
    # the pool was read before "x" came: a and b are equal through it, and x itself can't stand for anyone
    pairs = [write_pairs(warehouse, "bytes", [("a", "x", 0), ("b", "x", 0)])]
    decisions, _ = run(warehouse, [{"a": {}, "b": {}}], policy(duplicates={"exact": ["bytes"]}), pairs)
    assert (decisions["a"]["kept"], decisions["b"]["duplicate_of"]) == (True, "a")


def test_deciding_again_is_cached_and_another_threshold_is_not(warehouse):
    rows = [{"a": {"clip_score": 0.3}, "b": {"clip_score": 0.2}}]
    a_policy = policy(conditions={"clip": "clip_score >= $least"}, parameters={"least": 0.28})
    first, outcome = run(warehouse, rows, a_policy)
    assert not outcome.cached
    assert run(warehouse, rows, a_policy)[1].cached
    other, changed = run(warehouse, rows, a_policy.with_parameters({"least": 0.1}))
    assert not changed.cached
    assert (first["b"]["kept"], other["b"]["kept"]) == (False, True)


def test_another_policy_touches_no_signal(warehouse):
    pool = write_pool(warehouse, {"a": {}, "b": {}})
    signals = write_signals(warehouse, pool, {"a": {}, "b": {}})
    before = files(warehouse, "signals") | files(warehouse, "pools")
    for least in (0.1, 0.2):
        decide(pool, policy(conditions={"clip": f"clip_score >= {least}"}), signals, [], warehouse=warehouse)
    assert files(warehouse, "signals") | files(warehouse, "pools") == before


def test_the_order_of_conditions_is_part_of_the_decision(warehouse):
    rows = [{"a": {"width": 1, "language": "de"}}]
    conditions = {"side": "width > 9", "english": "language = 'en'"}
    one, _ = run(warehouse, rows, policy(conditions=conditions))
    other, outcome = run(warehouse, rows, policy(conditions=dict(reversed(conditions.items()))))
    assert not outcome.cached
    assert (one["a"]["failed"], other["a"]["failed"]) == (["side", "english"], ["english", "side"])


def test_the_record_holds_the_funnel(warehouse):
    pairs = [write_pairs(warehouse, "bytes", [("a", "b", 0)])]
    rows = {"a": {}, "b": {}, "c": {"width": 1}, "d": {"width": 1, "language": "de"}}
    a_policy = policy(
        conditions={"side": "width >= $least", "english": "language = 'en'"},
        duplicates={"exact": ["bytes"]},
        parameters={"least": 200},
    )
    _, outcome = run(warehouse, [rows], a_policy, pairs)
    record = read_record(warehouse, outcome.ref.record)
    funnel = Funnel.from_dict(record.result)
    assert (funnel.samples, funnel.kept) == (4, 1)
    assert [(s.name, s.rule, s.fails, s.fails_alone, s.remaining) for s in funnel.conditions] == [
        ("side", "width >= 200", 2, 1, 2),
        ("english", "language = 'en'", 1, 0, 2),
    ]
    assert [(s.name, s.rule, s.fails) for s in funnel.duplicates] == [("exact", "bytes", 1)]
    assert record.counts["kept"] == 1
    assert record.config["policy"]["parameters"] == {"least": 200}


def test_a_policy_without_conditions_keeps_all(warehouse):
    assert kept(run(warehouse, [{"a": {}}, {"b": {}}], policy())) == {"a", "b"}


def test_a_value_that_does_not_fit_names_the_condition(warehouse):
    with pytest.raises(PolicyError, match=r"policy p: .*metadata.* met a value it can't handle: .*try_cast"):
        run(
            warehouse,
            [{"a": {"metadata": '{"year": "unknown"}'}}],
            policy(conditions={"side": "width > 1", "new": "(metadata->>'year')::int > 2000"}),
        )


def test_a_duplicate_rule_whose_pairs_were_not_found_is_refused(warehouse):
    with pytest.raises(PolicyError, match=r'"near" needs pairs of kind perceptual, .* Kinds at hand: bytes, pixels'):
        pairs = [write_pairs(warehouse, kind, []) for kind in ("bytes", "pixels")]
        run(warehouse, [{"a": {}}], policy(duplicates=DEDUPLICATE), pairs)


def test_a_duplicate_rule_that_reaches_farther_than_pairs_were_looked_for_is_refused(warehouse):
    rows = {"a": {"phash": 0}, "b": {"phash": 0b111}, "c": {"phash": 0b11111}}
    pool = write_pool(warehouse, rows)
    signals = write_signals(warehouse, pool, rows)
    perceptual = next(signal for signal in signals if signal.signal == "perceptual")
    pairs = [find_perceptual_pairs(pool, perceptual, max_distance=4, warehouse=warehouse).ref]

    def near(distance: int) -> Policy:
        return policy(duplicates={"near": {"pairs": ["perceptual"], "max_distance": distance}})

    with pytest.raises(
        PolicyError, match=r'"near" reaches to distance 6, but pairs of kind .* only looked for up to 4'
    ):
        decide(pool, near(6), signals, pairs, warehouse=warehouse)
    found = decide(pool, near(4), signals, pairs, warehouse=warehouse).ref
    table = warehouse.read_table(found.table(pool.shards[0]))
    assert table["duplicate_of"].to_pylist() == [None, "a", None]


def test_an_unscored_shard_is_named(warehouse):
    pool = write_pool(warehouse, {"a": {}})
    signals = write_signals(warehouse, pool, {"a": {}})
    grown = write_pool(warehouse, {"a": {}}, {"b": {}})
    with pytest.raises(EvidenceError, match=r"signal size was not measured for shard .*Score the pool first"):
        decide(grown, policy(conditions={"side": "width > 1"}), signals, [], warehouse=warehouse)


def test_a_table_with_other_samples_than_its_shard_is_refused(warehouse):
    pool = write_pool(warehouse, {"a": {}, "b": {}})
    other = write_pool(warehouse, {"b": {}, "a": {}}, name="other")
    (signal,) = write_signals(warehouse, other, {"a": {}, "b": {}}, signals=["size"])
    target = warehouse.local_path(signal.table(pool.shards[0]))
    warehouse.local_path(signal.table(other.shards[0])).rename(target)
    with pytest.raises(EvidenceError, match="does not hold the samples of shard"):
        decide(pool, policy(conditions={"side": "width > 1"}), [signal], [], warehouse=warehouse)


def test_two_measurements_of_one_column_are_refused(warehouse):
    pool = write_pool(warehouse, {"a": {}})
    signals = write_signals(warehouse, pool, {"a": {}}, signals=["clip"])
    signals += write_signals(warehouse, pool, {"a": {}}, signals=["clip"], fingerprint_="2")
    with pytest.raises(EvidenceError, match='"clip_score" is in signal clip and in signal clip'):
        decide(pool, policy(), signals, [], warehouse=warehouse)


def test_an_empty_pool_is_refused(warehouse):
    with pytest.raises(EvidenceError, match="pool pool has no samples"):
        decide(write_pool(warehouse), policy(), [], [], warehouse=warehouse)
