"""One document at a time, by hand: what stays, what goes where, and in which order it stands."""

from typing import Any

import pytest

from tasks.curation.interleaved.nodes import Placement, judge_segments

DOM, MATCHED = Placement(False, None), Placement(True, None)


def judged(segments: str, placement: Placement, **images: Any) -> list[dict[str, Any]]:
    """Judge a document written as letters: t a text, x a text that fails, ? a missing image, others images.

    Of each image its similarity to every text, None if it was not decoded, or the condition that it fails.
    """
    document = {
        "document_id": "d",
        "segments": [
            {"kind": "text" if c in "tx" else "image", "sample_id": None if c in "tx?" else c} for c in segments
        ],
    }
    known = {}
    for name, said in images.items():
        is_failed = isinstance(said, str)
        known[name] = {
            "sample_id": name,
            "kept": not is_failed,
            "failed": [said] if is_failed else [],
            "duplicate_of": None,
            "duplicate_rule": None,
            "text_similarity": None if is_failed else said,
        }
    return judge_segments(document, known, [[] if c == "t" else ["words"] for c in segments if c in "tx"], placement)


def order(segments: str, nodes: list[dict[str, Any]]) -> str:
    """The segments that stay, as they are to stand."""
    placed = sorted((node["place"], segments[node["position"]]) for node in nodes if "place" in node)
    assert [place for place, _ in placed] == list(range(len(placed)))
    return "".join(letter for _, letter in placed)


@pytest.mark.parametrize(
    ("segments", "images", "expected"),
    [
        ("atbt", {"a": [0.1, 0.9], "b": [0.9, 0.1]}, "atbt"),
        ("atxbt", {"a": "side", "b": [0.1, 0.1, 0.1]}, "tbt"),
        ("?t", {}, "t"),
    ],
)
def test_dom_keeps_the_sources_order(segments: str, images: dict[str, Any], expected: str) -> None:
    assert order(segments, judged(segments, DOM, **images)) == expected


@pytest.mark.parametrize(
    ("segments", "images", "expected"),
    [
        ("atbt", {"a": [0.1, 0.9], "b": [0.9, 0.1]}, "btat"),
        ("abtt", {"a": [0.8, 0.7], "b": [0.9, 0.1]}, "btat"),  # one to one: a gives way, though t1 suits it best
        ("abct", {"a": [0.1], "b": [0.3], "c": [0.2]}, "abct"),  # leftovers, in the source's order
        ("abxt", {"a": [0.9, 0.1], "b": [0.9, 0.2]}, "abt"),  # texts that fail take no images
        ("abtt", {"a": "side", "b": [0.2, 0.1]}, "btt"),  # nor do images that fail take places
        ("tta", {"a": [0.1, 0.2]}, "tat"),
    ],
)
def test_matched_images_stand_before_their_text(segments: str, images: dict[str, Any], expected: str) -> None:
    assert order(segments, judged(segments, MATCHED, **images)) == expected


def test_reasons_are_all_there_and_missing_images_say_so() -> None:
    nodes = judged("a?xb", Placement(True, 0.3), a=[0.5], b="side")
    assert [node["failed"] for node in nodes] == [["unmatched"], ["missing"], ["words"], ["side"]]
    assert not any(node["kept"] for node in nodes)


def test_an_image_below_the_least_similarity_goes_and_names_what_it_had() -> None:
    a, b, *_ = judged("abtt", Placement(True, 0.3), a=[0.3, 0.0], b=[0.0, 0.29])
    assert (a["kept"], a["text_position"], a["similarity"]) == (True, 2, pytest.approx(0.3))
    assert (b["kept"], b["failed"], b["text_position"]) == (False, ["unmatched"], 3)


def test_an_image_that_was_not_decoded_is_unmatched() -> None:
    a, *_ = judged("at", MATCHED, a=None)
    assert (a["kept"], a["failed"]) == (False, ["unmatched"])
