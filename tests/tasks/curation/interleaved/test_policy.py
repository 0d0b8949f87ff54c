from pathlib import Path

import pyarrow as pa
import pytest

from tasks.curation.conditions import PolicyError
from tasks.curation.interleaved.policy import DocumentPolicy, load_document_policy
from tasks.curation.interleaved.similarity import COLUMNS
from tests.tasks.curation.handmade import SCHEMA
from tests.tasks.curation.interleaved.chain import POLICIES

IMAGES = pa.schema([*SCHEMA, *COLUMNS])
TEXTS = pa.schema([pa.field("letter_words", pa.int32()), pa.field("language", pa.string())])


def policy(**content: object) -> DocumentPolicy:
    return DocumentPolicy.model_validate({"name": "p", **content})


@pytest.mark.parametrize("file", sorted(POLICIES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_policy_works_with_the_signals_and_is_named_like_its_file(file: Path) -> None:
    assert load_document_policy(file).check(IMAGES, SCHEMA).policy.name == file.stem


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"texts": {"a": "wrods > 1"}}, 'condition "a" of texts uses "wrods", which no signal measures'),
        ({"texts": {"a": "kept_images > 1"}}, 'condition "a" of texts uses "kept_images"'),
        ({"documents": {"a": "letter_words"}}, 'condition "a" of documents gives integer, not true or false'),
        ({"documents": {"a": "(SELECT true)"}}, 'condition "a" of documents contains a query'),
        ({"documents": {"a": "random() > 1"}}, r'condition "a" of documents calls random\(\)'),
        ({"images": {"conditions": {"a": "widht > 1"}}}, 'condition "a" uses "widht".*Did you mean "width"'),
        ({"parameters": {"least": 1}}, "nothing uses the parameter least"),
        ({"prefer": ["missing_images"]}, 'preference "missing_images" has no direction'),
        ({"order": "matched", "similarity_min": "$least"}, r"similarity_min is \$least, which is not a number"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(content: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        checked = policy(**content)
        checked.check(IMAGES, TEXTS)
        assert checked.least_similarity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: p\nimages: {conditions: {missing: width > 1}}", "missing and unmatched are reasons of their own"),
        ("name: p\nsimilarity_min: 0.1", "similarity_min is for order matched"),
        ("name: p\norder: shuffled", "order: Input should be 'dom' or 'matched'"),
        ("name: p\nconditions: {a: width > 1}", "conditions: there is no such field. A document policy's fields: name"),
        ("name: p\ntexts: {a: letter_words > 1, a: letter_words > 2}", "'a' is there twice"),
    ],
)
def test_a_file_that_is_no_document_policy_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(PolicyError, match=f"(?s)p.yaml: .*{message}"):
        load_document_policy(tmp_path / "p.yaml")


def test_parameters_reach_every_part_and_images_get_their_own() -> None:
    rules = policy(
        parameters={"side": 5, "words": 6, "least": 0.2},
        images={"conditions": {"side": "width > $side"}},
        texts={"words": "letter_words > $words"},
        order="matched",
        similarity_min="$least",
    ).with_parameters({"side": 7, "least": 0.3})
    assert rules.image_policy.parameters == {"side": 7}
    assert rules.least_similarity == 0.3
    assert rules.check(IMAGES, TEXTS).policy == rules


def test_similarity_is_asked_for_only_where_it_is_used() -> None:
    assert not policy().needs_similarity
    assert policy(order="matched").needs_similarity
    assert policy(images={"conditions": {"a": "best_similarity > 0.1"}}).needs_similarity
