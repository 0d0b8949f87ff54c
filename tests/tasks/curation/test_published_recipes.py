"""The shipped policies of published recipes, against each recipe's rule written out in plain Python.

Captions are measured by the signals themselves, so what is compared is the whole way from a caption to the verdict.
"""

import itertools
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tasks.curation.batch import Batch
from tasks.curation.signals.caption import CaptionStatistics
from tasks.curation.signals.characters import Characters
from tasks.curation.signals.words import Words
from tests.tasks.curation.test_shipped_policies import failed

Row = dict[str, Any]
RNG = np.random.default_rng(7)


def measured(captions: list[str]) -> list[Row]:
    """What the signals measure of captions, and the captions."""
    batch = Batch(pa.array(captions))
    tables = [signal.measure(batch).to_pylist() for signal in (CaptionStatistics(), Characters(), Words())]
    return [{"caption": caption, **a, **b, **c} for caption, a, b, c in zip(captions, *tables, strict=True)]


def assert_same(folder: Path, policy: str, rows: list[Row], rule: Callable[[Row], dict[str, bool]]) -> None:
    """Every sample fails exactly the conditions that the rule says, and each of these is met by some and not by all."""
    named = {f"{at:05}": row for at, row in enumerate(rows)}
    truth = {sample: [name for name, passes in rule(row).items() if not passes] for sample, row in named.items()}
    assert failed(folder, policy, named) == truth
    for condition in rule(rows[0]):
        assert 0 < sum(condition in reasons for reasons in truth.values()) < len(rows), condition
    assert any(not reasons for reasons in truth.values())


def around(*edges: float) -> list[float]:
    """32-bit numbers on each edge and right beside it."""
    exact = [np.float32(edge) for edge in edges]
    return [float(n) for e in exact for n in (np.nextafter(e, np.float32(-9)), e, np.nextafter(e, np.float32(9)))]


def repetition(parts: list[Any], *, often_only: bool) -> float:
    """The n-gram repetition ratios of Data-Juicer, for ten parts, be they characters or words."""
    grams = [tuple(parts[at : at + 10]) for at in range(len(parts) - 9)]
    counts = sorted((grams.count(gram) for gram in set(grams)), reverse=True)
    if not counts:
        return 0.0
    repeated = [count for count in counts if count > 1]
    if often_only:
        repeated = counts[: min(int(np.sqrt(len(counts))), len(repeated))]
    return sum(repeated) / sum(counts)


def letters(text: str) -> list[str]:
    return [character for character in text if unicodedata.category(character)[0] in ("L", "M")]


def special(text: str) -> float:
    """The share of characters that are no letters."""
    return (len(text) - len(letters(text))) / len(text) if text else 1.0


def clean_words(text: str) -> list[str]:
    """Lower-case words without what is not a letter at either end."""
    found = []
    for word in text.lower().split():
        while word and not letters(word[0]):
            word = word[1:]
        while word and not letters(word[-1]):
            word = word[:-1]
        found += [word] if word else []
    return found


@pytest.mark.parametrize("threshold", [0.281, 0.243, 0.3])
def test_clip_threshold_is_datacomps_clip_score_with_a_threshold(tmp_path: Path, threshold: float) -> None:
    scores = np.array([*around(threshold), 0.0, -0.1, 0.5, *RNG.uniform(0.1, 0.4, 200)], np.float32)
    rows = {f"{at:04}": {"clip_score": float(score)} for at, score in enumerate(scores)}
    decisions = failed(tmp_path, "clip_threshold", rows, clip_min=threshold)
    keep = scores >= np.float32(threshold)
    assert [not reasons for reasons in decisions.values()] == keep.tolist()


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 100, 333])
def test_clip_top30_keeps_place_n_and_its_ties(tmp_path: Path, count: int) -> None:
    scores = (RNG.integers(0, 12, count) / 40).astype(np.float32)  # with many ties
    threshold = -np.sort(-scores)[int(count * 0.3)]
    rows = {f"{at:04}": {"clip_score": float(score)} for at, score in enumerate(scores)}
    decisions = failed(tmp_path, "clip_top30", rows)
    assert [not reasons for reasons in decisions.values()] == (scores >= threshold).tolist()


def test_laion2b_is_a_score_and_a_language(tmp_path: Path) -> None:
    def rule(row: Row) -> dict[str, bool]:
        return {"clip": np.float32(row["clip_score"]) >= np.float32(0.28), "english": row["language"] == "en"}

    scores = [*around(0.28), 0.1, 0.9]
    rows = [{"clip_score": s, "language": code} for s, code in itertools.product(scores, ("en", "de", "eng", None))]
    assert_same(tmp_path, "laion2b", rows, rule)


def fasttext_tokens(text: str) -> int:
    """As fastText's `readWord` does: cut at seven white bytes; a line's end is a token of its own."""
    tokens, inside = 0, False
    for character in text:
        if character in " \n\r\t\v\f\0":
            inside = False
            tokens += character == "\n"
        else:
            tokens += not inside
            inside = True
    return tokens


def test_datacomp_image_based_clip_is_the_intersection_of_both_filters(tmp_path: Path) -> None:
    captions = ["a dog", "adogs", "adogsx", "a\xa0dogs", "a\ndog", "adogs\n", "\n\n\n\n\n\n", "a\vdogs", "", "a b c d"]
    captions += ["a\0dogs", "日本 語テキスト", "a\u2003dog here", "      ", "\tadogsx  "]
    texts = measured(captions * 12)
    rows: list[Row] = [
        {
            **text,
            "language": str(RNG.choice(["en", "en", "en", "de"])),
            "cluster_wanted": bool(RNG.random() < 0.8),
            "clip_score": float(np.float32(RNG.integers(0, 30) / 64)),
        }
        for text in texts
    ]
    scores = np.array([row["clip_score"] for row in rows], np.float32)
    threshold = -np.sort(-scores)[int(len(scores) * 0.3)]

    def rule(row: Row) -> dict[str, bool]:
        return {
            "english": row["language"] == "en",
            "tokens": fasttext_tokens(row["caption"]) > 1,
            "characters": len(row["caption"]) > 5,
            "cluster": row["cluster_wanted"],
            "clip": row["clip_score"] >= threshold,
        }

    assert_same(tmp_path, "datacomp_image_based_clip", rows, rule)


CAPTIONS = [
    "a red car parked beside the white fence of an old house",
    "the quick brown fox jumps over the lazy dog " * 2,
    "the quick brown fox jumps over the lazy dog " * 4,
    "abcdefghijklmnopqrstuvwxyz of the and in to",
    "the damn dog in the garden of the house by the sea",
    "1234567890 !!! ??? the dog of the house",
    "abc 1234567890",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa of the",
    "oneword",
    "",
    "of the and in",
    "of the and",
    "Straße und Häuser",
    "abcdefg123",  # 0.7 letters, 0.3 special
    "abcdef!!!!",  # 0.6 alphanumeric
    "abcdef!!!!!",
    "of the (and) to --- in 42, «by» red",
]


def generated(count: int) -> list[str]:
    """Captions of random words, digits and marks, so that ratios fall on simple fractions."""
    stock = ["the", "of", "red", "house", "damn", "12", "!!", "dogs,", "in", "tree"]
    return [" ".join(RNG.choice(stock, int(RNG.integers(1, 14)))) for _ in range(count)]


def pairs_of_images(captions: list[str], sides: list[tuple[int, int]], **choices: list[Any]) -> list[Row]:
    """Each caption and each pair of sides several times, with a choice of every other column at random."""
    rows = []
    for at, text in enumerate(measured(captions)):
        width, height = sides[at % len(sides)]
        chosen = {name: values[RNG.integers(len(values))] for name, values in choices.items()}
        rows.append({**text, "width": width, "height": height, **chosen})
    return rows


def test_llava_558k_is_data_juicers_recipe(tmp_path: Path) -> None:
    sides = [(336, 336), (727, 606), (728, 606), (727, 607), (600, 200), (601, 200), (200, 600), (333, 1000)]
    sides += [(100, 300), (101, 303), (111, 333), (200, 606), (111, 334), (112, 334)]

    def rule(row: Row) -> dict[str, bool]:
        text, words = row["caption"], clean_words(row["caption"])
        size = max(1, len(text))
        return {
            "alnum": sum(character.isalnum() for character in text) / size >= 0.60,
            "char_repetition": repetition(list(text), often_only=True) <= 0.09373663,
            "flagged_words": words.count("damn") / max(1, len(words)) <= 0.0,
            "special_characters": 0.16534802 <= special(text) <= 0.42023757,
            "word_repetition": repetition(words, often_only=False) <= 0.03085751,
            "aspect": 0.333 <= row["width"] / row["height"] <= 3.0,
            "shape": row["width"] <= 727 and row["height"] <= 606,
            "bytes": row["file_bytes"] <= 124 * 1024,
            "clip": np.float32(row["clip_score"]) >= np.float32(0.20315419),
        }

    captions = (CAPTIONS + generated(20)) * 14 + generated(400)
    rows = pairs_of_images(
        captions, sides, file_bytes=[126_975, 126_976, 126_977, 9_000], clip_score=[*around(0.20315419), 0.3, 0.4]
    )
    assert_same(tmp_path, "llava_558k", rows, rule)


def test_obelics_nodes_are_the_rules_for_single_images_and_texts(tmp_path: Path) -> None:
    stop = {"the", "of", "in"}  # of the words below, those in the shipped list
    sides = [(640, 480), (150, 150), (149, 150), (150, 149), (300, 150), (301, 150), (150, 300), (150, 301)]
    sides += [(20_000, 10_000), (20_001, 12_000), (12_000, 20_001), (20_000, 20_000)]

    def rule(row: Row) -> dict[str, bool]:
        words = clean_words(row["caption"])
        of = max(1, len(words))
        return {
            "format": row["format"] in ("jpg", "jpeg", "png", "webp"),
            "side": 150 <= row["width"] <= 20_000 and 150 <= row["height"] <= 20_000,
            "aspect": 1 / 2 <= row["width"] / row["height"] <= 2,
            "words": len(words) >= 4,
            "stop_words": sum(word in stop for word in words) / of >= 0.3,
            "flagged_words": words.count("damn") / of <= 0.01,
            "special_characters": special(row["caption"]) <= 0.3,
        }

    hundred = " ".join(["the house"] * 49 + ["damn of"])  # one flagged word of a hundred
    rows = pairs_of_images(
        (["abcdefg123", hundred, hundred.removesuffix(" of"), *generated(60)]) * 12,
        sides,
        format=["jpeg", "png", "webp", "gif", "mpo", None],
    )
    assert_same(tmp_path, "obelics_nodes", rows, rule)
