"""Finds a base model's files by folder or hub name and tells exactly which they are, without loading them.

Only files that can be read without running somebody's code are taken: safetensors, JSON and text.
"""

import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from storage.fingerprint import fingerprint, folder_digest
from tasks.shipped import find_path

log = logging.getLogger(__name__)

# What transformers reads to load a model without running code of the model's own; no pickles.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt")


class MissingBaseModel(FileNotFoundError):  # noqa: N818 - says what is the matter
    """A base model's files are not to be had; the message says where they were sought and what to give instead."""


class UnsafeBaseModel(ValueError):  # noqa: N818 - says what is the matter
    """A base model would run code that came with it; the message names the file, and what to do instead."""


@dataclass(frozen=True)
class BaseModel:
    """A base model's files: the local `folder` they lie in and a `fingerprint` of them (or of their hub revision)."""

    name: str
    folder: Path
    fingerprint: str


def find_base_model(name: str) -> BaseModel:
    """Return the files of the model `name`: a local folder, or a hub name that is downloaded unless it is cached.

    Without network, or when `HF_HUB_OFFLINE` is set, a hub name is looked up in the hub's cache only.
    Raises `MissingBaseModel`, or `UnsafeBaseModel` if it needs code of its own.
    """
    folder = find_path(name)
    if folder.is_dir():
        _check_files(folder)
        return BaseModel(name, folder.absolute(), _digest(folder.absolute(), _signature(folder)))
    try:
        cached = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingBaseModel(
            f"base model {name!r}: no such folder, and the hub gave no model of that name ({_first_line(error)}). "
            "Give the path of a local model folder, or connect, and set HF_TOKEN if the model is gated."
        ) from None
    _check_files(cached)
    return BaseModel(name, cached, fingerprint(["hub", name, cached.name]))


def _check_files(folder: Path) -> None:
    """Raise unless the folder holds a model in safetensors that transformers has the code for itself."""
    if not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
        why = (
            f"Pickled weights ({pickled[0]}) are not read, because they can run code: load them where that does no "
            "harm, and save them again with transformers' save_pretrained."
            if pickled
            else "Give a folder that transformers' save_pretrained wrote."
        )
        raise MissingBaseModel(f"{folder}: holds no config.json with *.safetensors. {why}")
    for path in sorted(folder.glob("*config.json")):
        if _names_code(path):
            raise UnsafeBaseModel(
                f"{path}: auto_map names code that comes with the model, which is never run. Give a model that "
                "transformers has the code for; if it has it for this one, take auto_map out of the file."
            )


def _names_code(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # of what is no JSON, transformers will complain
        return False
    return isinstance(content, dict) and bool(content.get("auto_map"))


def find_config(name: str) -> Path:
    """Return the file that says what the model `name` is made of, as `find_base_model` finds it, but without weights.

    Raises `MissingBaseModel`.
    """
    folder = find_path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise MissingBaseModel(f"{folder}: holds no config.json. Give the folder of a transformers model.")
        return folder.absolute() / "config.json"
    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingBaseModel(
            f"base model {name!r}: no such folder, and the hub gave no config.json of that name "
            f"({_first_line(error)}). Give the path of a local model folder, or connect."
        ) from None


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files: while they stay the same, the digest need not be computed again."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)


@lru_cache(maxsize=16)
def _digest(folder: Path, signature: tuple[tuple[str, int, int], ...]) -> str:
    gib = sum(size for _, size, _ in signature) / 2**30
    if gib > 1:
        log.info("fingerprinting the %.1f GiB in %s", gib, folder)
    return folder_digest(folder)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), 'no details')}"
