"""What captions are made of, character by character: letters, digits and how often the same stretch comes again."""

import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import pyarrow as pa

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.signals.contract import Signal

NGRAM = 10
"""Characters in a stretch whose repetition is counted."""

_NOT_ALNUM = bytes(code for code in range(128) if not chr(code).isalnum())
_NOT_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())


@dataclass(frozen=True)
class Characters(Signal):
    """Ratios over the characters of a caption.

    `alnum_ratio` and `char_repetition` are Data-Juicer's `alphanumeric_filter` and `character_repetition_filter`, the
    latter also BigScience's and OBELICS's. One minus `letter_ratio` is the special-character ratio of those three,
    whose lists hold digits, white space, punctuation, symbols and emoji.
    """

    name = "characters"
    version = 1
    needs = Needs.NOTHING
    columns = pa.schema(
        [
            column("alnum_ratio", pa.float32(), "share of characters for which Python's `isalnum` holds, 0-1"),
            column("letter_ratio", pa.float32(), "share of characters that are letters or their marks, 0-1"),
            column(
                "char_repetition",
                pa.float32(),
                f"share that the most frequent {NGRAM}-grams of characters have in all, 0-1; 0 for shorter captions",
            ),
        ]
    )

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`. A missing caption gives nulls, an empty one zeros."""
        rows = [None if caption is None else _ratios(caption) for caption in batch.captions.to_pylist()]
        return pa.record_batch(
            [pa.array([row and row[at] for row in rows], pa.float32()) for at in range(len(self.columns))],
            schema=self.columns,
        )


def _ratios(caption: str) -> tuple[float, float, float]:
    if caption.isascii():  # bytes are counted ten times faster
        encoded = caption.encode()
        alnum, letters = len(encoded.translate(None, _NOT_ALNUM)), len(encoded.translate(None, _NOT_LETTERS))
    else:
        alnum, letters = sum(map(str.isalnum, caption)), sum(map(is_letter, caption))
    length = max(1, len(caption))
    return alnum / length, letters / length, _repetition(caption)


@lru_cache(maxsize=1 << 16)
def is_letter(character: str) -> bool:
    """Return whether Unicode calls a character a letter (L) or a combining mark (M)."""
    return unicodedata.category(character)[0] in "LM"


def _repetition(caption: str) -> float:
    """The share of the n-grams that come more than once, of these at most the root of all that differ."""
    ngrams = [caption[start : start + NGRAM] for start in range(len(caption) - NGRAM + 1)]
    if len(set(ngrams)) == len(ngrams):  # so with most captions, and counting takes twice as long
        return 0.0
    counts = Counter(ngrams)
    often = sorted((count for count in counts.values() if count > 1), reverse=True)
    return sum(often[: isqrt(len(counts))]) / len(ngrams)
