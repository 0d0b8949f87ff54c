import pytest

from tasks.curation.conditions import locked_connection
from tasks.curation.report.thresholds import thresholds


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("clip_score >= 0.28", {"clip_score": {0.28}}),
        ("0.28 <= clip_score", {"clip_score": {0.28}}),
        ("clip_score >= $least", {"clip_score": {0.3}}),
        ("caption_words BETWEEN 5 AND 200", {"caption_words": {5, 200}}),
        ("least(width, height) >= 200 and aspect <= 3.0", {"least(width, height)": {200}, "aspect": {3}}),
        ("letter_ratio >= 1 - $least", {"letter_ratio": {0.7}}),
        ("2 * width >= 3 * height", {}),
        ("not (a < -0.5 or b > 1e-3)", {"a": {-0.5}, "b": {0.001}}),
        ("language = 'en'", {}),
        ("width > height", {}),
        ("caption_is_url", {}),
    ],
)
def test_what_a_condition_compares_with_numbers(sql: str, expected: dict[str, set[float]]) -> None:
    with locked_connection() as connection:
        assert thresholds(connection, sql, {"least": 0.3}) == expected
