"""Caps and balances against their rules written out, and as the last word of a policy."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from storage.record import read_record
from storage.warehouse import Warehouse
from tasks.curation.conditions import PolicyError
from tasks.curation.decide import decide
from tasks.curation.funnel import Funnel
from tasks.curation.limits import draw_balanced, over_cap, uniform
from tasks.curation.policy import Balance, Policy
from tests.tasks.curation.handmade import write_pairs, write_pool, write_signals

CONCEPTS = ["dog"] * 8 + ["cat"] * 3 + ["axolotl"]


def drawn_samples(count: int, seed: int = 0) -> tuple[pa.Array, pa.Array]:
    """Ids and the concepts they mention, a few often and many rarely."""
    rng = np.random.default_rng(seed)
    rows = [sorted({f"c{int(c)}" for c in rng.zipf(1.6, rng.integers(0, 5)) if c < 200}) for _ in range(count)]
    return pa.array([f"{at:05}" for at in range(count)]), pa.array(rows, pa.list_(pa.string()))


def balance(**settings) -> Balance:
    return Balance(name="b", balance="concepts", at_most=settings.pop("at_most", 20), **settings)


def test_a_cap_keeps_the_best_of_each_group_with_ties_by_id():
    group = pa.chunked_array([["x", "x", "x", "y", None, None, None]])
    score = pa.chunked_array([[0.1, 0.9, 0.9, 0.0, 0.5, None, 0.7]])
    ids = pa.array(["a", "c", "b", "d", "e", "f", "g"])
    assert over_cap(1, group, [score], [True], ids).tolist() == [True, True, False, False, True, True, False]
    assert over_cap(2, group, [score], [True], ids).tolist() == [True, False, False, False, False, True, False]
    assert not over_cap(3, group, [score], [True], ids).any()


def test_a_balance_draws_each_sample_by_metaclips_probability():
    ids, concepts = drawn_samples(3000)
    rows = concepts.to_pylist()
    count = Counter(name for row in rows for name in row)
    out, counted = draw_balanced(balance(), 20, concepts, None, ids)
    chance = [1 - math.prod(1 - min(1, 20 / count[name]) for name in row) for row in rows]
    expected = [float(u) >= p for u, p in zip(uniform(ids, 0), chance, strict=True)]
    assert out.tolist() == expected
    after = Counter(name for row, gone in zip(rows, expected, strict=True) for name in row if not gone)
    assert {c.concept: (c.before, c.after) for c in counted} == {name: (count[name], after[name]) for name in count}
    assert [c.before for c in counted] == sorted(count.values(), reverse=True)


def test_rare_concepts_all_stay_and_frequent_ones_come_down():
    ids, concepts = drawn_samples(3000)
    _, counted = draw_balanced(balance(), 20, concepts, None, ids)
    rare = [c for c in counted if c.before <= 20]
    assert rare
    assert all(c.before == c.after for c in rare)
    assert counted[0].after < counted[0].before / 3


def test_the_draw_is_uniform_and_the_same_for_an_id_whatever_else_there_is():
    ids = pa.array([f"{at:05}" for at in range(20_000)])
    drawn = uniform(ids, 7)
    histogram, _ = np.histogram(drawn, bins=10, range=(0, 1))
    assert abs(histogram - 2000).max() < 200
    assert uniform(ids.slice(100, 5), 7).tolist() == drawn[100:105].tolist()
    assert not np.array_equal(uniform(ids, 8), drawn)


def test_samples_that_mention_nothing_go_unless_they_are_to_stay():
    ids, concepts = pa.array(["a", "b", "c"]), pa.array([["x"], [], None], pa.list_(pa.string()))
    assert draw_balanced(balance(), 20, concepts, None, ids)[0].tolist() == [False, True, True]
    assert draw_balanced(balance(keep_unmatched=True), 20, concepts, None, ids)[0].tolist() == [False, False, False]


def test_each_group_is_balanced_by_its_own_counts():
    ids, concepts = drawn_samples(2000)
    group = pa.array(["en" if at % 4 else "de" for at in range(2000)])
    out, _ = draw_balanced(balance(per="language"), 20, concepts, group, ids)
    for name in ("en", "de"):
        own = pa.array(np.flatnonzero(np.asarray(group.to_pylist(), object) == name))
        alone, _ = draw_balanced(balance(), 20, concepts.take(own), None, ids.take(own))
        assert out[own.to_numpy()].tolist() == alone.tolist()


def test_other_groups_get_the_tail_share_of_the_one_named():
    # en: 8 dog, 3 cat, 1 axolotl; with t = 4 a third of the mentions, 4 of 12, are of rare concepts
    names = [
        f"{name}-{language}" for language, times in (("en", 1), ("de", 10)) for name in CONCEPTS for _ in range(times)
    ]
    group = pa.array([name.split("-")[1] for name in names])
    concepts = pa.array([[name.split("-")[0]] for name in names])
    ids = pa.array([f"{at:04}" for at in range(len(names))])
    _, counted = draw_balanced(balance(per="language", tail_of="en"), 4, concepts, group, ids)
    out, _ = draw_balanced(balance(per="language", tail_of="en"), 4, concepts, group, ids)
    kept = Counter(name for name, gone in zip(names, out, strict=True) if not gone)
    # de: shares ascending are 10, 40, 120 of 120: a third is reached at cat, so t is 30
    assert (kept["cat-de"], kept["axolotl-de"]) == (30, 10)
    assert 15 <= kept["dog-de"] <= 45
    assert (kept["cat-en"], kept["axolotl-en"]) == (3, 1)
    assert sum(c.before for c in counted) == len(names)


SAMPLES = {
    "a": {"clip_score": 0.9, "url": "http://x/1", "concepts": ["dog"]},
    "b": {"clip_score": 0.8, "url": "http://x/2", "concepts": ["dog"]},
    "c": {"clip_score": 0.7, "url": "http://x/3", "concepts": ["cat"]},
    "d": {"clip_score": 0.1, "url": "http://x/4", "concepts": ["cat"]},
    "e": {"clip_score": 0.6, "url": "http://y/1", "concepts": []},
}
HOST = "split_part(url, '/', 3)"


def policy(**limits) -> Policy:
    return Policy.model_validate(
        {
            "name": "p",
            "parameters": {"most": 2},
            "conditions": {"clip": "clip_score >= 0.28"},
            "duplicates": {"exact": ["bytes"]},
            "prefer": ["clip_score desc"],
            "limits": {"per_host": {"cap_per": HOST, "at_most": "$most"}, **limits},
        }
    )


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def decided(warehouse: Warehouse, rules: Policy, *, signals=("clip", "concepts")) -> tuple[dict, Funnel]:
    pool = write_pool(warehouse, SAMPLES)
    refs = write_signals(warehouse, pool, SAMPLES, signals=signals)
    pairs = [write_pairs(warehouse, "bytes", [("b", "c", 0)])]
    ref = decide(pool, rules, refs, pairs, warehouse=warehouse).ref
    rows = [row for shard in pool.shards for row in warehouse.read_table(ref.table(shard)).to_pylist()]
    reasons = {row["sample_id"]: (row["kept"], row["failed"], row["duplicate_of"]) for row in rows}
    return reasons, Funnel.from_dict(read_record(warehouse, ref.record).result)


def test_limits_come_after_conditions_and_duplicates_and_give_their_name_as_the_reason(warehouse):
    reasons, funnel = decided(warehouse, policy().with_parameters({"most": 1}))
    assert reasons == {
        "a": (True, [], None),
        "b": (False, ["per_host"], None),
        "c": (False, [], "b"),
        "d": (False, ["clip"], None),
        "e": (True, [], None),
    }
    assert [(stage.name, stage.fails, stage.remaining) for stage in funnel.limits] == [("per_host", 1, 2)]
    assert (funnel.kept, funnel.limits[0].rule) == (2, f"at most 1 per {HOST}")


def test_a_balance_sees_what_the_limits_before_it_have_left(warehouse):
    rules = policy(concepts={"balance": "concepts", "at_most": 10})
    reasons, funnel = decided(warehouse, rules)
    assert {name: failed for name, (_, failed, _) in reasons.items() if failed} == {"d": ["clip"], "e": ["concepts"]}
    assert [(c.concept, c.before, c.after) for c in funnel.concepts] == [("dog", 2, 2)]


def test_a_balance_without_its_signal_says_what_to_measure(warehouse):
    with pytest.raises(PolicyError, match="needs the signal concepts"):
        decided(warehouse, policy(concepts={"balance": "concepts", "at_most": 10}), signals=("clip",))


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"cap_per": "hosst", "at_most": 1}, 'limit "x" uses "hosst"'),
        ({"cap_per": "url", "at_most": 0}, "at least 1"),
        ({"cap_per": "url", "at_most": 1.5}, "whole number"),
        ({"cap_per": "url", "at_most": "$none"}, "not a number among the policy's parameters"),
        ({"balance": "concepts", "at_most": 1, "tail_of": "en"}, "give per"),
        ({"balance": "colours", "at_most": 1}, "Input should be 'concepts'"),
    ],
)
def test_a_limit_that_cannot_work_is_refused_by_name(warehouse, limit, message):
    with pytest.raises((PolicyError, ValueError), match=message):
        decided(warehouse, policy(x=limit))


def test_a_limit_may_not_have_the_name_of_a_condition():
    with pytest.raises(ValueError, match="condition or limit clip is there twice"):
        policy(clip={"cap_per": "url", "at_most": 1})


def test_limits_have_nothing_to_do_where_conditions_left_nothing(tmp_path: Path):
    samples = {"a": {"clip_score": 0.1}, "b": {"clip_score": 0.2, "language": "de"}}
    warehouse = Warehouse(str(tmp_path))
    pool = write_pool(warehouse, samples)
    signals = write_signals(warehouse, pool, samples)
    policy = Policy.model_validate(
        {
            "name": "p",
            "conditions": {"clip": "clip_score > 0.9"},
            "limits": {
                "host": {"cap_per": "language", "at_most": 1},
                "concepts": {"balance": "concepts", "at_most": 1, "per": "language", "tail_of": "en"},
            },
        }
    )
    ref = decide(pool, policy, signals, [], warehouse=warehouse).ref
    rows = warehouse.read_table(ref.table(pool.shards[0])).to_pylist()
    assert [row["failed"] for row in rows] == [["clip"], ["clip"]]
