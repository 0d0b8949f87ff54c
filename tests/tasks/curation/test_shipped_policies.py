"""The shipped policies against rules written independently of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

import tasks
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.policy import Policy, load_policy
from tests.tasks.curation.handmade import SCHEMA, write_pairs, write_pool, write_signals

POLICIES = Path(tasks.__file__).parent.parent / "deployments" / "policies"


@pytest.mark.parametrize("file", sorted(POLICIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_policy_works_with_the_signals_and_is_named_like_its_file(file):
    assert load_policy(file).check(SCHEMA).policy.name == file.stem


def failed(tmp_path: Path, name: str, rows: dict[str, dict], **parameters) -> dict[str, list[str]]:
    warehouse = Warehouse(str(tmp_path))
    pool = write_pool(warehouse, rows)
    pairs = [write_pairs(warehouse, kind, []) for kind in ("bytes", "pixels", "perceptual")]
    policy = load_policy(POLICIES / f"{name}.yaml").with_parameters(parameters)
    outcome = decide(pool, policy, write_signals(warehouse, pool, rows), pairs, warehouse=warehouse)
    table = warehouse.read_table(outcome.ref.table(pool.shards[0]))
    return dict(zip(table["sample_id"].to_pylist(), table["failed"].to_pylist(), strict=True))


def basic_filter(text: str, language: str, width: int, height: int) -> bool:
    """DataComp's `basic_filter` as the paper and `baselines/apply_filter.py` state it."""
    if language != "en" or not len(text.split()) > 2 or not len(text) > 5:
        return False
    return min(width, height) >= 200 and max(width, height) / min(width, height) <= 3.0


def test_datacomp_basic_is_basic_filter_over_random_rows_and_edges(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["a b", "a b c", "ab cd ef", "a  b\tc\n", "abcdef", "", "dog", "one two three four", "  a b c  "]
    sides = [1, 66, 67, 199, 200, 201, 599, 600, 601, 603, 604, 1000, 20_000, 59_999, 60_000, 60_001]
    truth, rows = {}, {}
    for at in range(3000):
        text, language = str(rng.choice(texts)), str(rng.choice(["en", "en", "en", "de"]))
        width, height = int(rng.choice(sides)), int(rng.choice(sides))
        if at % 3 == 0:  # on and next to the limit of three to one
            width = int(rng.integers(200, 20_000))
            height = 3 * width + int(rng.integers(-1, 2))
        rows[f"{at:04}"] = {
            "caption_words": len(text.split()),
            "caption_chars": len(text),
            "language": language,
            "width": width,
            "height": height,
            "aspect": max(width, height) / min(width, height),
        }
        truth[f"{at:04}"] = basic_filter(text, language, width, height)
    decisions = failed(tmp_path, "datacomp_basic", rows)
    assert {sample: not reasons for sample, reasons in decisions.items()} == truth
    assert 0.05 < np.mean(list(truth.values())) < 0.95


def test_clip_top30_keeps_three_tenths_and_the_next(tmp_path):
    rows = {f"{at:03}": {"clip_score": at / 100} for at in range(100)}
    decisions = failed(tmp_path, "clip_top30", rows)
    assert {sample for sample, reasons in decisions.items() if not reasons} == {f"{at:03}" for at in range(69, 100)}


@pytest.mark.parametrize(
    ("reason", "passing", "failing"),
    [
        ("words", {"caption_words": 5}, {"caption_words": 4}),
        ("words", {"caption_words": 200}, {"caption_words": 201}),
        ("side", {"width": 200}, {"width": 199}),
        ("side", {"height": 200}, {"height": 199}),
        ("aspect", {"aspect": 3.0}, {"aspect": 3.001}),
        ("english", {"language": "en"}, {"language": "de"}),
        ("clip", {"clip_score": 0.28}, {"clip_score": 0.2799}),
        ("safe", {"nsfw_score": 0.4999}, {"nsfw_score": 0.5}),
        ("caption_text", {}, {"caption_is_url": True}),
        ("caption_text", {}, {"caption_is_filename": True}),
        ("caption_text", {}, {"caption_is_boilerplate": True}),
        ("aspect", {}, {"aspect": None}),
    ],
)
def test_default_fails_a_sample_for_one_reason_from_its_limit_on(tmp_path, reason, passing, failing):
    assert failed(tmp_path, "default", {"in": passing, "out": failing}) == {"in": [], "out": [reason]}


def test_default_takes_other_thresholds(tmp_path):
    assert failed(tmp_path, "default", {"a": {"clip_score": 0.29}}, clip_min=0.3) == {"a": ["clip"]}


def test_the_samples_policy_is_the_default_with_one_rule_more():
    default, sample = (load_policy(POLICIES / f"{name}.yaml").model_dump() for name in ("default", "sample"))
    del sample["parameters"]["epsilon"]
    semantic = sample["duplicates"][-1]
    assert (semantic["name"], semantic["pairs"]) == ("semantic", ("semantic",))
    sample["duplicates"] = sample["duplicates"][:-1]
    for text in ("name", "description"):
        del sample[text], default[text]
    assert sample == default


def test_the_readmes_policy_can_be_used():
    text = (POLICIES.parent.parent / "README.md").read_text()
    block = text[text.index("```yaml\n") + 8 :]
    policy = Policy.model_validate(yaml.safe_load(block[: block.index("```")]))
    checked = policy.check(pa.schema([*SCHEMA, pa.field("laplacian_variance", pa.float32())]))
    assert (checked.policy.evaluation_pools, checked.at_most) == (("pets-test",), (500, 20_000))
