import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from tasks.evaluation.metrics import is_exact_match, normalise, wilson_interval


@pytest.mark.parametrize(
    ("text", "compared"),
    [
        (" Red  circle. ", "red circle"),
        ("red\ncircle", "red circle"),
        ("RED CIRCLE", "red circle"),
        ("ﬁve", "five"),
        ("Straße", "strasse"),
        ("3.5", "3.5"),
        ("red circle .", "red circle"),
        ("", ""),
    ],
)
def test_texts_are_compared_without_case_spacing_and_full_stop(text: str, compared: str) -> None:
    assert normalise(text) == compared


@pytest.mark.parametrize(
    ("answer", "expected"), [("a red circle", "red circle"), ("circle red", "red circle"), ("yes!", "yes"), ("", "no")]
)
def test_articles_order_and_other_marks_count(answer: str, expected: str) -> None:
    assert not is_exact_match(answer, expected)


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_interval_is_scipys(trials: tuple[int, int]) -> None:
    successes, total = trials
    share = wilson_interval(successes, total)
    oracle = binomtest(successes, total).proportion_ci(0.95, method="wilson")
    assert share.value == successes / total
    assert (share.low, share.high) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_the_interval_of_nine_in_ten() -> None:
    share = wilson_interval(9, 10)
    assert (round(share.low, 3), round(share.high, 3)) == (0.596, 0.982)


@pytest.mark.parametrize("trials", [(0, 0), (2, 1), (-1, 3)])
def test_impossible_counts_are_refused(trials: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="successes of"):
        wilson_interval(*trials)
