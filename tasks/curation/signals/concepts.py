"""Concepts: which entries of a list of words and phrases a caption mentions, as MetaCLIP matches its metadata.

The list is WordNet's, or any text file; balancing draws on what is matched, and so can any query.
"""

import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from ahocorasick_rs import AhoCorasick

from storage.fingerprint import fingerprint
from storage.schema import column
from tasks.curation import entries as shipped
from tasks.curation.batch import Batch, Needs
from tasks.curation.signals.contract import Signal

WORDNET = Path(shipped.__file__).with_name("wordnet.txt.gz")

_PADDED = re.compile(r"([,.;:?!`])")
_BREAKS = re.compile(r"[\t\n\r]")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Thai, Lao, Burmese, Khmer, kana and Han: scripts written without spaces between words."""


@dataclass(frozen=True)
class Concepts(Signal):
    """The entries that a caption mentions (MetaCLIP, arXiv:2309.16671, and its second version, arXiv:2507.22062).

    An entry is matched where it stands between spaces or the punctuation `, . ; : ? ! ` and the backtick, not inside a
    word; entries in scripts that are written without spaces are matched anywhere. `entries` is a text file, one entry a
    line, also gzipped, in any language; None for the lemmas of WordNet 3.1, all in lower case. With `fold_case` case
    does not count; MetaCLIP's own code does not fold it.
    """

    entries: str | None = None
    fold_case: bool = True

    name = "concepts"
    version = 1
    needs = Needs.NOTHING
    columns = pa.schema(
        [
            column("concept_count", pa.int32(), "different entries that the caption mentions"),
            column("concepts", pa.list_(pa.string()), "these entries, in the order of the list"),
        ]
    )

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`. Raises `FileNotFoundError` if there is no such file of entries."""
        return {"entries": _digest(*_file(self.entries)), "fold_case": self.fold_case}

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`. A missing caption gives nulls."""
        names, automaton = _automaton(*_file(self.entries), self.fold_case)
        found = []
        for caption in batch.captions.to_pylist():
            text = None if caption is None else _spaced(caption.lower() if self.fold_case else caption)
            matches = None if text is None else automaton.find_matches_as_indexes(text, overlapping=True)
            found.append(None if matches is None else [names[at] for at in sorted({at for at, _, _ in matches})])
        counts = pa.array([None if row is None else len(row) for row in found], pa.int32())
        return pa.record_batch([counts, pa.array(found, pa.list_(pa.string()))], schema=self.columns)


def _spaced(caption: str) -> str:
    """The caption with a space at either end and around punctuation, so that an entry in spaces is a substring."""
    return " " + _PADDED.sub(r" \1 ", _BREAKS.sub(" ", caption)) + " "


def _file(given: str | None) -> tuple[Path, int]:
    """The file of entries and when it was modified, so that it is read once a process unless that changes."""
    path = WORDNET if given is None else Path(given).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: there is no such file of entries. Give a text file, one entry a line, or none for WordNet."
        )
    return path, path.stat().st_mtime_ns


@cache
def _entries(path: Path, modified: int) -> tuple[str, ...]:
    """The entries of a file, each once, in its order."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        lines = (" ".join(line.split()) for line in data.decode().splitlines())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}). Save the entries as UTF-8, one a line.") from None
    return tuple(dict.fromkeys(line for line in lines if line))


@cache
def _digest(path: Path, modified: int) -> str:
    return fingerprint(list(_entries(path, modified)))


@cache
def _automaton(path: Path, modified: int, fold_case: bool) -> tuple[tuple[str, ...], AhoCorasick]:
    names = _entries(path, modified)
    folded = [name.lower() for name in names] if fold_case else names
    return names, AhoCorasick([name if _UNSPACED.search(name) else f" {name} " for name in folded])
