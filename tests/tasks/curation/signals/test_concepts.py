"""Concepts against MetaCLIP's rule written out: an entry in spaces is a substring of the padded caption."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.curation.batch import Batch
from tasks.curation.signals.concepts import WORDNET, Concepts

ENTRIES = ("dog", "hot dog", "cat", "Paris", "a", "犬", "東京", "café")


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("entries") / "entries.txt"
    path.write_text("\n".join(["", *ENTRIES, "dog", "  "]), encoding="utf-8")
    return str(path)


def measured(captions: list[str | None], **settings) -> list[list[str] | None]:
    return Concepts(**settings).measure(Batch(pa.array(captions, pa.string())))["concepts"].to_pylist()


def by_the_rule(caption: str) -> list[str]:
    for mark in ",.;:?!`":
        caption = caption.replace(mark, f" {mark} ")
    text = " " + caption.replace("\t", " ").replace("\n", " ").replace("\r", " ") + " "
    return [entry for entry in ENTRIES if (entry if entry in ("犬", "東京") else f" {entry} ") in text]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog", ["dog", "a"]),
        ("A hot dog, a cat!", ["dog", "hot dog", "cat", "a"]),
        ("dogs and catfish", []),
        ("dog\ncat", ["dog", "cat"]),
        ("東京の犬です", ["犬", "東京"]),
        ("café.", ["café"]),
        ("paris", []),
        ("", []),
    ],
)
def test_an_entry_is_matched_between_spaces_and_punctuation(entries, caption, expected):
    assert measured([caption], entries=entries, fold_case=False) == [expected]


@given(st.text(st.sampled_from("dogcat hP.,\n犬東京é"), max_size=30))
def test_matches_are_those_of_the_rule(tmp_path_factory, caption):
    path = tmp_path_factory.getbasetemp() / "list.txt"
    if not path.exists():
        path.write_text("\n".join(ENTRIES), encoding="utf-8")
    assert measured([caption], entries=str(path), fold_case=False) == [by_the_rule(caption)]


def test_case_can_be_folded(entries):
    assert measured(["PARIS and a DOG"], entries=entries) == [["dog", "Paris", "a"]]


def test_a_missing_caption_has_no_concepts_and_an_empty_one_none(entries):
    table = Concepts(entries).measure(Batch(pa.array([None, ""])))
    assert table.to_pylist() == [
        {"concept_count": None, "concepts": None},
        {"concept_count": 0, "concepts": []},
    ]


def test_wordnets_lemmas_are_shipped():
    lemmas = gzip.decompress(WORDNET.read_bytes()).decode().splitlines()
    assert len(lemmas) == len(set(lemmas)) > 140_000
    assert measured(["Two zebras near a Hot Dog stand"])[0] == ["a", "dog", "hot", "hot dog", "near", "stand", "two"]


def test_the_fingerprint_follows_the_list_and_not_its_place(entries, tmp_path: Path):
    copy = tmp_path / "copy.txt.gz"
    copy.write_bytes(gzip.compress(Path(entries).read_bytes()))
    assert Concepts(entries).ref == Concepts(str(copy)).ref != Concepts().ref


def test_a_list_that_changed_is_read_again(tmp_path: Path):
    file = tmp_path / "pets.txt"
    file.write_text("dog\n")
    before = Concepts(str(file))
    assert before.ref == Concepts(str(file)).ref
    file.write_text("cat\n")
    os.utime(file, ns=(1, 1))
    after = Concepts(str(file))
    assert after.ref != before.ref
    assert after.measure(Batch(pa.array(["a cat and a dog"]))).column("concepts").to_pylist() == [["cat"]]


def test_a_missing_list_is_an_error_that_says_what_to_give(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such file of entries"):
        Concepts(str(tmp_path / "none.txt")).ref  # noqa: B018
