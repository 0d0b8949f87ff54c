"""Finds a base model's files by folder or hub name and tells exactly which they are, without loading them."""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from storage.fingerprint import fingerprint, folder_digest

log = logging.getLogger(__name__)

# What transformers reads to load a model without running code of the model's own; no pickles.
FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.txt")


class MissingBaseModel(FileNotFoundError):  # noqa: N818 - says what is the matter
    """A base model's files are not to be had; the message says where they were sought and what to give instead."""


@dataclass(frozen=True)
class BaseModel:
    """A base model's files: the local `folder` they lie in and a `fingerprint` of them (or of their hub revision)."""

    name: str
    folder: Path
    fingerprint: str


def find_base_model(name: str) -> BaseModel:
    """Return the files of the model `name`: a local folder, or a hub name that is downloaded unless it is cached.

    Without network, or when `HF_HUB_OFFLINE` is set, a hub name is looked up in the hub's cache only.
    Raises `MissingBaseModel`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
            raise MissingBaseModel(
                f"{folder}: holds no config.json with *.safetensors. Give a folder that transformers' save_pretrained "
                "wrote (pickled weights are not read)."
            )
        return BaseModel(name, folder.absolute(), _digest(folder.absolute(), _signature(folder)))
    try:
        cached = Path(snapshot_download(name, allow_patterns=list(FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise MissingBaseModel(
            f"base model {name!r}: no such folder, and the hub gave no model of that name ({_first_line(error)}). "
            "Give the path of a local model folder, or connect, and set HF_TOKEN if the model is gated."
        ) from None
    return BaseModel(name, cached, fingerprint(["hub", name, cached.name]))


def find_config(name: str) -> Path:
    """Return the file that says what the model `name` is made of, as `find_base_model` finds it, but without weights.

    Raises `MissingBaseModel`.
    """
    folder = Path(name).expanduser()
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
