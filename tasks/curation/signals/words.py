"""How much of a caption is ordinary language, and how much is language to keep out: shares of listed words."""

import importlib.util
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import stop_words

from storage.fingerprint import fingerprint
from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.signals.characters import is_letter
from tasks.curation.signals.contract import Signal

NGRAM = 10
"""Words in a stretch whose repetition is counted."""

_SHIPPED_FLAGGED = ("better_profanity", "profanity_wordlist.txt")


@dataclass(frozen=True)
class Words(Signal):
    """Shares of stop words, flagged words and repeated stretches, as BigScience, OBELICS and Data-Juicer count them.

    A word is what Python's `split` gives, in lower case, without whatever is not a letter at either end; what has no
    letter is no word. `stop_words` is a language code of the package stop-words (BSD) or a text file, one word a line;
    `flagged_words` such a file, by default the English list of the package better-profanity (MIT). The lists of the
    published recipes are others: give theirs as files to have the same ratios. Meaningless for languages written
    without spaces; entries of several words never match.
    """

    stop_words: str = "en"
    flagged_words: str | None = None

    name = "words"
    version = 1
    needs = Needs.NOTHING
    columns = pa.schema(
        [
            column("letter_words", pa.int32(), "words that hold a letter"),
            column("stop_word_ratio", pa.float32(), "share of these that are stop words, 0-1; 0 without words"),
            column("flagged_word_ratio", pa.float32(), "share of these that are flagged, 0-1; 0 without words"),
            column("word_repetition", pa.float32(), f"share of {NGRAM}-grams of words that come more than once, 0-1"),
        ]
    )

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`. Raises `FileNotFoundError` for a list that is neither shipped nor a file."""
        stop, flagged = _stop_words(self.stop_words), _flagged_words(self.flagged_words)
        return {"stop_words": fingerprint(sorted(stop)), "flagged_words": fingerprint(sorted(flagged))}

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`. A missing caption gives nulls."""
        lists = _stop_words(self.stop_words), _flagged_words(self.flagged_words)
        rows = [None if caption is None else _measured(caption, *lists) for caption in batch.captions.to_pylist()]
        return pa.record_batch(
            [pa.array([row and row[at] for row in rows], field.type) for at, field in enumerate(self.columns)],
            schema=self.columns,
        )


def _measured(caption: str, stop: frozenset[str], flagged: frozenset[str]) -> tuple[int, float, float, float]:
    words = words_of(caption)
    return len(words), _share(words, stop), _share(words, flagged), _repetition(words)


def words_of(caption: str) -> list[str]:
    """Return the words of a caption as `Words` counts them."""
    found = (word if word.isalpha() else _stripped(word) for word in caption.lower().split())
    return [word for word in found if word]


def _stripped(word: str) -> str:
    letters = [at for at, character in enumerate(word) if is_letter(character)]
    return word[letters[0] : letters[-1] + 1] if letters else ""


def _share(words: list[str], listed: frozenset[str]) -> float:
    return sum(word in listed for word in words) / max(1, len(words))


def _repetition(words: list[str]) -> float:
    ngrams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    if len(set(ngrams)) == len(ngrams):
        return 0.0
    return sum(count for count in Counter(ngrams).values() if count > 1) / len(ngrams)


def _stop_words(given: str) -> frozenset[str]:
    if given in stop_words.LANGUAGE_MAPPING:
        return _shipped_stop_words(given)
    known = ", ".join(sorted(stop_words.LANGUAGE_MAPPING))
    return _listed(Path(given).expanduser(), f"Stop words are shipped for {known}; for others give a file.")


@cache
def _shipped_stop_words(language: str) -> frozenset[str]:
    return frozenset(word.lower() for word in stop_words.get_stop_words(language))


def _flagged_words(given: str | None) -> frozenset[str]:
    if given is not None:
        return _listed(Path(given).expanduser(), "Leave flagged_words out for the list of better-profanity.")
    package, name = _SHIPPED_FLAGGED
    spec = importlib.util.find_spec(package)  # its import would build tables of spellings that nobody here uses
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed. Run: pip install better-profanity")
    return _listed(Path(spec.origin).with_name(name), "Reinstall better-profanity, which holds it.")


def _listed(file: Path, advice: str) -> frozenset[str]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such list of words. {advice}")
    return _words_in(file, file.stat().st_mtime_ns)


@cache
def _words_in(file: Path, modified: int) -> frozenset[str]:
    """Read a list once a process, unless it is modified meanwhile."""
    lines = (line.strip().lower() for line in file.read_text(encoding="utf-8").splitlines())
    return frozenset(line for line in lines if line)
