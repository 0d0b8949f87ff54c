"""CLIP models by open_clip: finding a tag's weights, loading, preprocessing and encoding."""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.nn import functional

from storage.fingerprint import fingerprint
from tasks.curation.signals.clip_checkpoint import Checkpoint
from tasks.curation.signals.contract import MissingWeights

_DEFAULT_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_loaded: dict[str, "ClipModel"] = {}
_loading = threading.Lock()


class ClipModel:
    """A CLIP model on the GPU if there is one, in bfloat16 there, else on the CPU in float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self._model: Any = open_clip.create_model(
                checkpoint.model,
                str(checkpoint.weights) if checkpoint.weights else None,
                device=self.device,
                force_quick_gelu=checkpoint.quick_gelu,
                force_preprocess_cfg=dict(checkpoint.preprocessing),
                require_pretrained=True,
            ).eval()
            self._tokenize: Callable[[list[str]], torch.Tensor] = open_clip.get_tokenizer(checkpoint.model)
        except OSError as error:  # a configuration may name a text tower or tokenizer on the hub
            raise MissingWeights(
                f"CLIP {checkpoint.model}: its text tower or tokenizer can't be found: {error}. "
                "Give local-dir:<folder> with the tokenizer's files beside the weights."
            ) from error
        config = PreprocessCfg(**self._model.visual.preprocess_cfg)
        self.preprocess: Callable[[Image.Image], torch.Tensor] = image_transform_v2(config, is_train=False)

    def encode_images(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return L2-normalised embeddings of preprocessed images, float32 on the CPU, (images, embedding size)."""
        with torch.inference_mode(), self._precision():
            features = self._model.encode_image(torch.stack(list(inputs)).to(self.device))
        return functional.normalize(features.float(), dim=-1).cpu()

    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Return L2-normalised embeddings of texts, float32 on the CPU, (texts, embedding size)."""
        with torch.inference_mode(), self._precision():
            features = self._model.encode_text(self._tokenize(list(texts)).to(self.device))
        return functional.normalize(features.float(), dim=-1).cpu()

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def load(checkpoint: Checkpoint) -> ClipModel:
    """Return the checkpoint's model, loaded once a process whichever thread asks first."""
    key = fingerprint(checkpoint.parameters)
    with _loading:
        if key not in _loaded:
            _loaded[key] = ClipModel(checkpoint)
        return _loaded[key]


def weights_of_tag(model: str, tag: str) -> tuple[Path, Mapping[str, Any]]:
    """Return the weights file of an open_clip tag and what open_clip says about it, downloading it if need be.

    Raises `MissingWeights` if the file is neither cached nor to be had, and `ValueError` for an unknown tag.
    """
    details: Mapping[str, Any] = get_pretrained_cfg(model, tag)
    if not details:
        known = ", ".join(list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"CLIP {model}: open_clip has no weights {tag!r} for it. Tags: {known}.")
    repository, _, file = details["hf_hub"].rpartition("/")
    names = (file,) if file else _DEFAULT_HUB_FILES
    try:
        return _cached(repository, names) or _downloaded(repository, names), details
    except Exception as error:  # what the network's libraries raise has no ancestor in common
        raise MissingWeights(
            f"CLIP {model}, weights {tag!r}: {' or '.join(names)} of {repository} is not in {constants.HF_HUB_CACHE}, "
            f"and can't be downloaded: {error}. Fetch it where there is a network and give the file's path in place of "
            "the tag, or give local-dir:<folder> in place of the model."
        ) from error


def _cached(repository: str, names: Sequence[str]) -> Path | None:
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    return None


def _downloaded(repository: str, names: Sequence[str]) -> Path:
    for name in names[:-1]:
        try:
            get_hf_file_metadata(hf_hub_url(repository, name))  # without a network this fails at once: no retries
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError:
            continue
    get_hf_file_metadata(hf_hub_url(repository, names[-1]))
    return Path(hf_hub_download(repository, names[-1]))
