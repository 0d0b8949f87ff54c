"""Where a CLIP model's weights are on this machine, and the hash of all that its scores depend on.

Imports neither torch nor open_clip for models on disk, so that finding a cached score costs nothing.
"""

import difflib
import importlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from storage.fingerprint import file_digest, folder_digest
from tasks.curation.signals.contract import MissingWeights
from tasks.shipped import find_path

LOCAL_FOLDER = "local-dir:"
CONFIG_FILE = "open_clip_config.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_TAG_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Checkpoint:
    """A model that open_clip can build from this machine's disk alone.

    `model` is open_clip's name for it: an architecture, whose `weights` are then given, or `local-dir:` and a folder
    that holds everything. `preprocessing` overrides open_clip's default for the architecture.
    """

    model: str
    weights: Path | None
    digest: str
    architecture: Mapping[str, Any]
    preprocessing: Mapping[str, Any]
    quick_gelu: bool = False

    @property
    def embedding_size(self) -> int:
        """Length of an embedding."""
        return int(self.architecture["embed_dim"])

    @property
    def parameters(self) -> dict[str, Any]:
        """All that scores depend on, whatever folder the files are in."""
        if self.weights is None:
            return {"folder": self.digest}
        return {
            "model": self.model,
            "architecture": self.architecture,
            "weights": self.digest,
            "preprocessing": self.preprocessing,
            "quick_gelu": self.quick_gelu,
        }


def find_checkpoint(model: str, pretrained: str | None) -> Checkpoint:
    """Return the checkpoint of `local-dir:<folder>`, or of an architecture with a weights file or open_clip tag.

    A tag's weights are taken from the Hugging Face cache, or downloaded into it. Raises `MissingWeights` if there are
    none, saying where they were looked for, and `ValueError` for an architecture or tag that open_clip does not know.
    """
    if model.startswith(LOCAL_FOLDER):
        return _in_folder(find_path(model.removeprefix(LOCAL_FOLDER)))
    architecture = _architecture(model)
    if pretrained is None:
        raise MissingWeights(f"CLIP {model}: no weights given. Give an open_clip tag or a weights file.")
    file = Path(pretrained).expanduser()
    if file.is_file():
        return Checkpoint(model, file, _digest(file, file.stat().st_mtime_ns), architecture, {})
    if file.suffix in (".safetensors", ".bin", ".pth", ".pt") or "/" in pretrained:
        raise MissingWeights(f"CLIP {model}: there is no weights file {file.absolute()}.")
    return _of_tag(model, pretrained, architecture)


def _in_folder(folder: Path) -> Checkpoint:
    wanted = f"Give {LOCAL_FOLDER}<folder> with {CONFIG_FILE}, weights ({', '.join(_WEIGHTS)}) and any tokenizer files."
    if not (folder / CONFIG_FILE).is_file():
        raise MissingWeights(f"CLIP {LOCAL_FOLDER}{folder}: there is no {(folder / CONFIG_FILE).absolute()}. {wanted}")
    if not any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        raise MissingWeights(f"CLIP {LOCAL_FOLDER}{folder}: {folder.absolute()} holds no weights. {wanted}")
    config = json.loads((folder / CONFIG_FILE).read_text())
    newest = max(file.stat().st_mtime_ns for file in folder.rglob("*"))
    digest = _digest(folder, newest)
    return Checkpoint(f"{LOCAL_FOLDER}{folder}", None, digest, config["model_cfg"], config.get("preprocess_cfg", {}))


def _of_tag(model: str, tag: str, architecture: Mapping[str, Any]) -> Checkpoint:
    weights_of_tag = importlib.import_module("tasks.curation.signals.clip_model").weights_of_tag  # imports open_clip
    file, details = weights_of_tag(model, tag)
    return Checkpoint(
        model,
        file,
        _digest(file, file.stat().st_mtime_ns),
        architecture,
        {key: details[key] for key in _TAG_PREPROCESSING if details.get(key) is not None},
        quick_gelu=bool(details.get("quick_gelu")),
    )


def _architecture(model: str) -> dict[str, Any]:
    """Read open_clip's configuration of an architecture without importing open_clip, which takes seconds."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("open_clip is not installed. Run: pip install open_clip_torch")
    configs = {file.stem: file for file in Path(package.origin).with_name("model_configs").glob("*.json")}
    if model not in configs:
        close = difflib.get_close_matches(model, configs, n=3)
        hint = (
            f"Did you mean {' or '.join(close)}?" if close else f"Models on disk are given as {LOCAL_FOLDER}<folder>."
        )
        raise ValueError(f"CLIP {model!r}: open_clip has no such architecture. {hint}")
    return dict(json.loads(configs[model].read_text()))


@cache
def _digest(path: Path, modified: int) -> str:
    """Hash a file or folder once a process, unless it is modified meanwhile."""
    return file_digest(path) if path.is_file() else folder_digest(path)
