"""Stable identities for values: canonical JSON, hashed.

A fingerprint names everything a result depends on, so it must not change between processes, machines or Python
versions. A value without a stable serialisation is refused instead of being turned into text.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

LENGTH = 16
"""Hex digits of a fingerprint as used in paths: 64 bits, enough for the results of one warehouse."""


class FingerprintError(TypeError):
    """A value has no stable serialisation; the message names where in the structure it sits."""


def fingerprint(value: Any) -> str:
    """Return the first `LENGTH` hex digits of the sha256 of `value`'s canonical JSON.

    Accepts None, bool, int, finite float, str, enums, lists, tuples, mappings with string keys, dataclasses and
    pydantic models, nested. Raises `FingerprintError` for anything else (sets, paths, arrays, callables).
    """
    return hashlib.sha256(canonical_json(value).encode(errors="surrogatepass")).hexdigest()[:LENGTH]


def canonical_json(value: Any) -> str:
    """Return `value` as JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(_plain(value, "value"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Return a fingerprint of all files below `folder`: their relative names and bytes. Hidden files are ignored."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"{folder}: no files to fingerprint. Give a folder that holds the model's files.")
    return fingerprint({str(p.relative_to(folder).as_posix()): file_digest(p) for p in files})


def _plain(value: Any, where: str) -> Any:
    if value is None or type(value) in (str, bool, int):  # nearly all there is; subclasses may be enums
        return value
    if isinstance(value, Enum):
        return _plain(value.value, where)
    if isinstance(value, str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise FingerprintError(f"{where} is {value}, which JSON can't hold. Use None or a finite number.")
        return value
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="python"), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise FingerprintError(f"{where} has keys that are not strings: {list(value)[:5]}. Use string keys.")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise FingerprintError(
        f"{where} is a {type(value).__name__}, which has no stable serialisation. "
        "Pass numbers, text, lists, dicts, dataclasses or pydantic models."
    )
