import sys
import unicodedata
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.curation.batch import Batch
from tasks.curation.signals.characters import Characters


def ratios(*captions: str | None) -> list[dict[str, float | None]]:
    return Characters().measure(Batch(pa.array(captions, pa.string()))).to_pylist()


def repetition(text: str, length: int = 10) -> float:
    """Data-Juicer's character_repetition_filter, as its documentation and code state it."""
    frequencies: dict[str, int] = {}
    for start in range(len(text) - length + 1):
        gram = text[start : start + length]
        frequencies[gram] = frequencies.get(gram, 0) + 1
    if not frequencies:
        return 0.0
    descending = sorted(frequencies.values(), reverse=True)
    repeated = min(int(np.sqrt(len(descending))), len(descending) - descending.count(1))
    return sum(descending[:repeated]) / sum(descending)


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("abcab c"), max_size=60) | st.text(max_size=30), max_size=5))
def test_repetition_is_that_of_data_juicer(captions: list[str]) -> None:
    found = [row["char_repetition"] for row in ratios(*captions)]
    assert found == [np.float32(repetition(caption)) for caption in captions]


def test_repetition_counts_only_the_most_frequent_stretches() -> None:
    assert ratios("abcdefghij" * 3)[0]["char_repetition"] == np.float32(7 / 21)  # 3 + 2 + 2: root of the 10 that differ
    assert [row["char_repetition"] for row in ratios("abcdefghi", "a" * 10, "a" * 11)] == [0, 0, 1]


def test_every_character_is_alphanumeric_as_python_says_and_a_letter_as_unicode_says() -> None:
    characters = [chr(code) for code in range(0, sys.maxunicode + 1, 11) if not 0xD800 <= code < 0xE000]
    rows = ratios(*characters)
    assert [row["alnum_ratio"] == 1 for row in rows] == [character.isalnum() for character in characters]
    assert [row["letter_ratio"] == 1 for row in rows] == [unicodedata.category(c)[0] in "LM" for c in characters]


def test_ratios_count_all_characters() -> None:
    (row,) = ratios("ab1 !")
    assert row["alnum_ratio"] == pytest.approx(3 / 5)
    assert row["letter_ratio"] == pytest.approx(2 / 5)


def test_an_empty_caption_has_zeros_and_a_missing_one_nulls() -> None:
    assert [set(row.values()) for row in ratios("", None)] == [{0.0}, {None}]
    assert Counter(type(row["alnum_ratio"]) for row in ratios("", None)) == {float: 1, type(None): 1}
