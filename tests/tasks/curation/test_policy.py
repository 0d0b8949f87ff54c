"""Policy files and models: what is read, refused and overridden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pydantic import TypeAdapter, ValidationError

from storage.fingerprint import fingerprint
from tasks.curation.policy import Condition, DuplicateRule, Policy, PolicyError, TopFraction, load_policy
from tests.tasks.curation.handmade import SCHEMA

TEXT = """
name: small
parameters: {side: 200, near: 4, share: 0.3}
conditions:
  side: least(width, height) >= $side
  best: {top_fraction: $share, of: clip_score}
duplicates:
  exact: [bytes, pixels]
  near: {pairs: [perceptual], max_distance: $near}
prefer: [clip_score desc, width * height desc]
splits: {validation: 0.2, test: 0, seed: 3}
"""


def read(folder: Path, text: str) -> Policy:
    path = folder / "small.yaml"
    path.write_text(text)
    return load_policy(path)


def test_a_file_is_read_in_its_order(tmp_path):
    policy = read(tmp_path, TEXT)
    assert policy.conditions == (
        Condition(name="side", sql="least(width, height) >= $side"),
        TopFraction(name="best", top_fraction="$share", of="clip_score"),
    )
    assert policy.duplicates == (
        DuplicateRule(name="exact", pairs=("bytes", "pixels"), max_distance=0),
        DuplicateRule(name="near", pairs=("perceptual",), max_distance="$near"),
    )
    assert (policy.splits.validation, policy.splits.test, policy.splits.seed) == (0.2, 0, 3)


def test_a_checked_policy_has_its_numbers_filled_in(tmp_path):
    checked = read(tmp_path, TEXT).check(SCHEMA)
    assert (dict(checked.fractions), checked.distances, checked.descending) == ({1: 0.3}, (0, 4), (True, True))
    assert checked.columns == {"width", "height", "clip_score"}


def test_json_that_does_not_keep_the_order_of_objects_gives_the_policy_back(tmp_path):
    # a server may store a flow's parameters in a form that sorts the keys of objects
    policy = read(tmp_path, TEXT)
    again = Policy.model_validate(json.loads(json.dumps(policy.model_dump(mode="json"), sort_keys=True)))
    assert again.model_dump() == policy.model_dump()
    assert fingerprint(again) == fingerprint(policy)


def test_the_order_of_conditions_is_part_of_the_fingerprint():
    conditions = {"a": "width > 1", "b": "height > 1"}
    one = Policy.model_validate({"name": "p", "conditions": conditions})
    other = Policy.model_validate({"name": "p", "conditions": dict(reversed(conditions.items()))})
    assert fingerprint(one) != fingerprint(other)


def test_parameters_can_be_overridden_without_touching_the_policy(tmp_path):
    policy = read(tmp_path, TEXT)
    changed = policy.with_parameters({"share": 0.1, "near": 2})
    assert (changed.parameters, policy.parameters["share"]) == ({"side": 200, "near": 2, "share": 0.1}, 0.3)
    assert dict(changed.check(SCHEMA).fractions) == {1: 0.1}
    assert changed.origin == "small.yaml"


@pytest.mark.parametrize(
    ("declared", "given", "became"),
    [
        (3, 3.0, 3),
        (3, 3.5, 3.5),
        (0.5, 1, 1.0),
        (3, np.int64(4), 4),
        (0.5, np.float32(0.25), 0.25),
        (2**60, 2**60 + 1, 2**60 + 1),
    ],
)
def test_an_override_is_the_kind_of_number_that_it_stands_for(declared, given, became):
    policy = Policy(name="p", parameters={"n": declared}).with_parameters({"n": given})
    assert (policy.parameters["n"], type(policy.parameters["n"])) == (became, type(became))


def test_a_form_that_gives_every_number_as_a_float_changes_no_decision():
    policy = Policy(name="p", parameters={"part": 3}, conditions={"host": "split_part(url, '/', $part) = 'a'"})  # type: ignore[arg-type]
    given = TypeAdapter(dict[str, float | str]).validate_python({"part": 3})
    assert fingerprint(policy.with_parameters(given)) == fingerprint(policy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sides": 3}, 'small.yaml has no parameter "sides". Did you mean "side"\\? Parameters: near, share, side.'),
        ({"side": "wide"}, "parameter side is 200 and can't become 'wide'"),
        ({"side": True}, "parameter side is 200 and can't become True"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(tmp_path, values, message):
    with pytest.raises(PolicyError, match=message):
        read(tmp_path, TEXT).with_parameters(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: p\nconditions: {a: width > 1, a: width > 2}", "'a' is there twice"),
        ("name: p\nname: q", "'name' is there twice"),
        (
            "name: p\nthreshold: 3",
            "threshold: there is no such field. A policy's fields: name, description, parameters",
        ),
        ("name: p\nconditions: {a: {top_fraction: 0.3, by: clip_score}}", "conditions.a.by: there is no such field"),
        ("name: p\nconditions: {a: yes}", "conditions.a.sql: Input should be a valid string"),
        (
            "name: p\nconditions: {a: {top_fraction: best, of: x}}",
            "conditions.a.top_fraction: 'best' is neither a number",
        ),
        ("name: p\nconditions: {split_conflict: 'true'}", "condition split_conflict: publishing uses this name itself"),
        ("name: p\nconditions: [{name: a, sql: x}, {name: a, sql: y}]", "condition a is there twice"),
        ("name: p\nparameters: {a: yes}", "parameters.a: give a number or text"),
        ("name: p\nparameters: {a: .nan}", "parameters.a: give a finite number"),
        ("name: p\nduplicates: {a: {pairs: []}}", "duplicates.a.pairs: "),
        (
            "name: p\nsplits: {validation: 0.6, test: 0.6}",
            "splits: validation 0.6 and test 0.6 leave nothing to train on",
        ),
        ("name: Small Policy", "name: String should match pattern"),
        ("- a\n- b", "holds list, not a policy"),
        ("name: [", "not a YAML file"),
        ("", "holds NoneType, not a policy"),
    ],
)
def test_a_file_at_fault_is_named_with_the_place(tmp_path, text, message):
    with pytest.raises(PolicyError, match=f"^small.yaml: .*{message}"):
        read(tmp_path, text)


def test_a_missing_file_says_where_shipped_ones_are(tmp_path):
    with pytest.raises(PolicyError, match=r"there is no such policy file. Shipped ones lie in deployments/policies"):
        load_policy(tmp_path / "small.yaml")


def refused(**fields) -> str:
    with pytest.raises(PolicyError) as error:
        Policy.model_validate({"name": "p", **fields}).check(SCHEMA)
    return str(error.value)


def test_an_unknown_column_is_named_with_its_condition_and_the_columns_that_exist():
    message = refused(conditions={"side": "width > 1", "sharp": "clip_scor > 0.1"})
    assert message.startswith(
        'policy p: condition "sharp" uses "clip_scor", which no signal measures. Did you mean "clip_score"? '
        "Columns of what is measured: "
    )
    assert "caption, caption_chars" in message  # of the samples and of the signals
    assert "image_embedding" not in message  # lists are not offered


def test_a_condition_must_be_true_or_false():
    assert 'condition "wide" gives integer, not true or false' in refused(conditions={"wide": "width"})


def test_a_top_fraction_ranks_by_a_number_and_keeps_a_share():
    best = {"top_fraction": 0.5, "of": "language"}
    assert 'condition "best" ranks by varchar' in refused(conditions={"best": best})
    for share in (0, 1.5):
        message = refused(conditions={"best": {"top_fraction": share, "of": "clip_score"}})
        assert f"keeps the top {share}. Use a share above 0 and up to 1" in message


def test_a_preference_says_its_direction_and_is_checked_like_a_condition():
    assert 'preference "clip_score" has no direction' in refused(prefer=["clip_score"])
    assert 'preference "random() desc" calls random()' in refused(prefer=["random() desc"])
    assert "is more than one SQL expression" in refused(prefer=["1) order by (random() desc"])


def test_parameters_are_declared_and_used():
    assert "$least, which is not among the policy's parameters" in refused(conditions={"a": "width > $least"})
    assert "nothing uses the parameter least" in refused(parameters={"least": 3})
    message = refused(conditions={"a": {"top_fraction": "$shar", "of": "width"}}, parameters={"share": 0.1})
    assert 'condition "a", top_fraction is $shar, which is not a number' in message
    assert 'Did you mean "share"?' in message


def test_a_policy_can_be_a_form():
    properties = Policy.model_json_schema()["properties"]
    assert all("description" in field for field in properties.values())
    with pytest.raises(ValidationError):
        Policy(name="p", unknown=3)


def test_check_takes_any_columns():
    policy = Policy.model_validate({"name": "p", "conditions": {"sharp": "blur < 3", "free": "url is null"}})
    assert policy.check(pa.schema([("blur", pa.float32())])).columns == {"blur", "url"}


def test_the_reach_is_the_largest_distance_asked_of_each_kind():
    rules = {
        "exact": ["bytes", "perceptual"],
        "near": {"pairs": ["perceptual"], "max_distance": 4},
        "far": {"pairs": ["perceptual"], "max_distance": "$far", "confirm": 0.05},
        "same": {"pairs": ["semantic"], "max_distance": 0.03, "rule": "official"},
    }
    policy = Policy.model_validate({"name": "p", "duplicates": rules, "parameters": {"far": 10}})
    assert policy.reach() == {"bytes": 0, "perceptual": 10, "semantic": 0.05}
    checked = policy.check(SCHEMA)
    assert (checked.distances, checked.confirmations) == ((0, 4, 10, 0.03), (None, None, 0.05, None))


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_pairs_are_asked_for_in_the_policys_order_in_every_process(seed):
    # decisions are named by them: in another order they would be made again
    code = "from tasks.curation.policy import load_policy as p; print(*p('deployments/policies/sample.yaml').reach())"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.split() == ["bytes", "pixels", "perceptual", "semantic"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"pairs": ["semantic", "perceptual"]}, "near: semantic distances are 1 - cosine and perceptual ones are bits"),
        ({"pairs": ["semantic"], "confirm": 0.1}, "near: semantic pairs can't confirm themselves"),
        ({"pairs": ["bytes"], "rule": "semdedup"}, "near.rule: Input should be 'greedy', 'official' or 'components'"),
        ({"pairs": ["bytes"], "confirm": "near"}, "near.confirm.*'near' is neither a number nor a \\$parameter"),
    ],
)
def test_duplicate_rules_that_make_no_sense_are_refused(tmp_path, rule, message):
    with pytest.raises(PolicyError, match=message):
        read(tmp_path, json.dumps({"name": "p", "duplicates": {"near": rule}}))


@pytest.mark.parametrize(
    ("word", "sql", "descending"),
    [("hard", "centroid_distance", True), ("easy", "centroid_distance", False), ("random", "md5(key)", False)],
)
def test_semdedups_words_are_preferences(word, sql, descending):
    checked = Policy.model_validate({"name": "p", "prefer": [word]}).check(SCHEMA)
    assert ([e.sql for e in checked.prefer], checked.descending) == ([sql], (descending,))
