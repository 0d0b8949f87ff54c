"""Scores answers: exact match after a stated normalisation, with a Wilson interval."""

import math
import unicodedata
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""Standard normal quantile of 0.975: a two-sided 95 % interval."""


@dataclass(frozen=True)
class Share:
    """A share of `total` trials, 0–1, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    total: int


def normalise(text: str) -> str:
    """Return `text` as it is compared: NFKC, case folded, white space as single blanks, no full stop at the end.

    `" Red  circle. "` and `"red circle"` are equal; articles, other punctuation and word order are kept.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).removesuffix(".").rstrip()


def is_exact_match(answer: str, expected: str) -> bool:
    """Whether the two texts are equal once normalised."""
    return normalise(answer) == normalise(expected)


def wilson_interval(successes: int, total: int) -> Share:
    """Return the share of successes with its 95 % Wilson score interval (Wilson 1927), which holds near 0 and 1 too.

    Raises `ValueError` unless 0 ≤ successes ≤ total and total ≥ 1.
    """
    if not 0 <= successes <= total or total < 1:
        raise ValueError(
            f"{successes} successes of {total} trials: give 0 ≤ successes ≤ total, with at least one trial"
        )
    share = successes / total
    square = Z_95**2 / total
    centre = (share + square / 2) / (1 + square)
    margin = math.sqrt(share * (1 - share) * square + square**2 / 4) / (1 + square)
    return Share(share, max(0.0, centre - margin), min(1.0, centre + margin), total)
