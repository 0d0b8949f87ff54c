import os
from pathlib import Path

import pyarrow as pa
import pytest

from tasks.curation.batch import Batch
from tasks.curation.signals.words import Words, words_of


@pytest.fixture
def lists(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "stop.txt").write_text("the\nOf\n\nдом\nहै\n")
    (tmp_path / "flagged.txt").write_text("heck\ndarn\n")
    return {"stop_words": str(tmp_path / "stop.txt"), "flagged_words": str(tmp_path / "flagged.txt")}


def measured(signal: Words, *captions: str | None) -> list[dict[str, float | None]]:
    return signal.measure(Batch(pa.array(captions, pa.string()))).to_pylist()


def test_words_are_lower_case_and_stripped_of_what_is_no_letter() -> None:
    assert words_of("  «The» 12 cats' don't\t3rd -- (red) é́!") == ["the", "cats", "don't", "rd", "red", "é́"]


def test_shares_are_of_the_words_that_are_left(lists: dict[str, str]) -> None:
    (row,) = measured(Words(**lists), "The 3 houses of HECK, heck! 2024")
    assert row == {
        "letter_words": 5,
        "stop_word_ratio": pytest.approx(2 / 5),
        "flagged_word_ratio": pytest.approx(2 / 5),
        "word_repetition": 0,
    }


def test_words_of_every_script_are_found_in_their_list(lists: dict[str, str]) -> None:
    rows = measured(Words(**lists), "Дом дом.", "है है", "東京 タワー")
    assert [row["stop_word_ratio"] for row in rows] == [1, 1, 0]


def test_repetition_is_the_share_of_ten_word_stretches_that_come_more_than_once() -> None:
    ten = "one two three four five six seven eight nine ten"
    rows = measured(Words(), ten, f"{ten} {ten}", f"{ten} more {ten}", ten.removesuffix(" ten"))
    assert [row["word_repetition"] for row in rows] == pytest.approx([0, 2 / 11, 2 / 12, 0])


def test_no_words_give_zeros_and_no_caption_nulls() -> None:
    empty, digits, missing = measured(Words(), "", "12 34", None)
    assert set(empty.values()) == set(digits.values()) == {0}
    assert set(missing.values()) == {None}


def test_the_shipped_lists_know_plain_words() -> None:
    (row,) = measured(Words(), "the cat and the damn dog")
    assert row["stop_word_ratio"] == pytest.approx(3 / 6)
    assert row["flagged_word_ratio"] == pytest.approx(1 / 6)
    assert measured(Words("de"), "das Haus und der Hund")[0]["stop_word_ratio"] == pytest.approx(3 / 5)


def test_the_fingerprint_follows_the_words_not_the_file(lists: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "elsewhere.txt"
    other.write_text("дом\nof\nthe\nहै\n")
    assert Words(**{**lists, "stop_words": str(other)}).ref == Words(**lists).ref
    other_words = tmp_path / "other.txt"
    other_words.write_text("a\n")
    assert Words(**{**lists, "stop_words": str(other_words)}).ref != Words(**lists).ref


def test_a_list_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "flagged.txt"
    file.write_text("blob\n")
    before = Words(flagged_words=str(file)).ref
    file.write_text("slime\n")
    os.utime(file, ns=(1, 1))
    after = Words(flagged_words=str(file))
    assert after.ref != before
    assert measured(after, "blob of slime here")[0]["flagged_word_ratio"] == pytest.approx(1 / 4)


def test_a_list_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"tlh: there is no such list of words\. Stop words are shipped for ar"):
        Words("tlh").ref  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"none\.txt: there is no such list"):
        Words(flagged_words="none.txt").ref  # noqa: B018
