from pathlib import Path

import pytest

from storage.refs import PoolRef, SnapshotRef
from storage.warehouse import Warehouse
from tasks.curation.columns import EvidenceError
from tasks.curation.decide import decide
from tasks.curation.explain import Judgement, explain
from tasks.curation.policy import Policy
from tasks.curation.publish import publish
from tests.tasks.curation.handmade import write_pairs, write_pool, write_signals

SAMPLES = {
    "a": {"clip_score": 0.9},
    "b": {"clip_score": 0.8, "caption": "a | pipe <b>and</b> `code`"},
    "c": {"clip_score": 0.2, "width": 100},
}


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    warehouse = Warehouse(str(tmp_path))
    pool = write_pool(warehouse, SAMPLES)
    signals = write_signals(warehouse, pool, SAMPLES)
    pairs = [write_pairs(warehouse, "bytes", [("a", "b", 0)])]
    for least in (0.1, 0.28):
        policy = Policy.model_validate(
            {
                "name": "p",
                "parameters": {"least": least},
                "conditions": {
                    "clip": "clip_score >= $least",
                    "side": "least(width, height) >= 200",
                    "best": {"top_fraction": 0.9, "of": "clip_score"},
                },
                "duplicates": {"exact": ["bytes"]},
                "prefer": ["clip_score desc"],
                "splits": {"validation": 0, "test": 0},
            }
        )
        decisions = decide(pool, policy, signals, pairs, warehouse=warehouse).ref
        publish("set", pool, decisions, policy, signals, pairs, warehouse=warehouse)
    return warehouse


def curated(tmp_path: Path, pools: dict[str, dict], **words) -> tuple[Warehouse, list[PoolRef]]:
    """A dataset of each pool's name, by a policy that prefers by score."""
    warehouse, refs = Warehouse(str(tmp_path)), []
    policy = Policy.model_validate({"name": "p", "prefer": ["clip_score desc"], **words})
    for name, rows in pools.items():
        refs.append(write_pool(warehouse, rows, name=name))
        signals = write_signals(warehouse, refs[-1], rows)
        decisions = decide(refs[-1], policy, signals, [], warehouse=warehouse).ref
        publish(name, refs[-1], decisions, policy, signals, [], warehouse=warehouse)
    return warehouse, refs


def test_a_kept_sample_shows_its_measurements_and_its_split(warehouse):
    found = explain("a", warehouse=warehouse)
    assert (found.key, found.caption, found.image) == ("key-a", "caption of a", b"image of a")
    assert found.measurements["width"] == 640
    assert [(v.snapshot, v.kept, v.split) for v in found.verdicts] == [
        (SnapshotRef("set", 1), True, "train"),
        (SnapshotRef("set", 2), True, "train"),
    ]


def test_a_rejected_sample_shows_every_condition_beside_its_value(warehouse):
    first, second = explain("c", warehouse=warehouse).verdicts
    assert [judgement.passed for judgement in first.judgements] == [True, False, True]
    clip, side, best = second.judgements
    assert (clip.passed, clip.values) == (False, {"clip_score": pytest.approx(0.2), "$least": 0.28})
    assert side == Judgement("side", "least(width, height) >= 200", {"height": 480, "width": 100}, passed=False)
    assert (best.sql, best.values) == ("top 0.9 by clip_score", {"clip_score": pytest.approx(0.2)})


def test_a_duplicate_names_its_survivor_and_the_pair_behind_it(warehouse):
    found = explain("b", warehouse=warehouse)
    assert found.pairs == (("bytes", "a", "key-a", 0.0),)
    assert {(v.kept, v.duplicate_of, v.duplicate_rule) for v in found.verdicts} == {(False, "a", "exact")}
    assert "## set@2: rejected: duplicate of `a` (exact, distance 0)" in found.markdown()


def test_a_megabyte_of_caption_is_shown_by_its_beginning(tmp_path):
    caption = "dog " * 300_000
    warehouse, _ = curated(tmp_path, {"pool": {"a": {"caption": caption}}}, conditions={"long": "length(caption) > 1"})
    found = explain("a", warehouse=warehouse)
    assert found.caption == caption
    assert len(found.markdown()) < 10_000
    assert "… (1,199,999 characters)" in found.markdown()


def test_a_top_fraction_given_by_a_parameter_shows_its_value(tmp_path):
    best = {"best": {"top_fraction": "$share", "of": "clip_score"}}
    warehouse, _ = curated(tmp_path, {"pool": SAMPLES}, conditions=best, parameters={"share": 0.5})
    [verdict] = explain("a", warehouse=warehouse).verdicts
    assert verdict.judgements[0].values == {"clip_score": pytest.approx(0.9), "$share": 0.5}


def test_a_sample_that_a_limit_leaves_out_names_the_limit(tmp_path):
    warehouse, (pool,) = curated(tmp_path, {"pool": SAMPLES}, limits={"one": {"cap_per": "language", "at_most": 1}})
    assert pool.rows == 3
    found = explain("b", warehouse=warehouse)
    assert [verdict.failed for verdict in found.verdicts] == [("one",)]
    assert "## pool@1: rejected: fails one" in found.markdown()


def test_a_sample_in_several_pools_has_the_verdicts_of_all(tmp_path):
    a, b, c = ({name: row} for name, row in SAMPLES.items())
    warehouse, _ = curated(tmp_path, {"one": a | b, "two": b | c})
    found = {name: explain(name, warehouse=warehouse) for name in SAMPLES}
    assert {name: [str(v.snapshot) for v in one.verdicts] for name, one in found.items()} == {
        "a": ["one@1"],
        "b": ["one@1", "two@1"],
        "c": ["two@1"],
    }
    assert (found["a"].pools, found["b"].pools) == (("one",), ("one", "two"))
    assert "`b` in pools one, two, from source.tar b" in found["b"].markdown()


def test_other_peoples_text_stays_in_its_cell(warehouse):
    [line] = [line for line in explain("b", warehouse=warehouse).markdown().splitlines() if line.startswith("> ")]
    assert line == "> a \\| pipe &lt;b>and&lt;/b> 'code'"


def test_an_unknown_sample_is_an_error_that_says_how_to_look(warehouse):
    with pytest.raises(EvidenceError, match=r"no pool holds sample 'zzz'.*by its key"):
        explain("zzz", warehouse=warehouse)


def test_the_verdict_comes_first_with_thresholds_in_place_and_nothing_that_was_not_measured(warehouse):
    text = explain("c", warehouse=warehouse).markdown()
    assert "| ✗ | clip | `clip_score >= 0.28` | clip_score = 0.2 |" in text
    assert text.index("## set@2") < text.index("## Measurements") < text.index("| width | 100 |")
    assert "|  |" not in text
