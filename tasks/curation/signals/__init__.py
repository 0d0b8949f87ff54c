"""Signals: what can be measured of a sample, one class a file, and the settings that choose among them."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.curation.signals.aesthetic import Aesthetic
from tasks.curation.signals.caption import CaptionStatistics
from tasks.curation.signals.characters import Characters
from tasks.curation.signals.clip import Clip
from tasks.curation.signals.clip_nsfw import ClipNsfw
from tasks.curation.signals.cluster import Cluster
from tasks.curation.signals.concepts import Concepts
from tasks.curation.signals.contract import MissingWeights, Signal
from tasks.curation.signals.exact import ExactHashes
from tasks.curation.signals.faces import Faces
from tasks.curation.signals.language import Language
from tasks.curation.signals.nsfw import Nsfw
from tasks.curation.signals.perceptual import Decoding, PerceptualHash
from tasks.curation.signals.pinned_file import PinnedFile
from tasks.curation.signals.sharpness import Sharpness
from tasks.curation.signals.size import Size
from tasks.curation.signals.text_area import TextArea
from tasks.curation.signals.words import Words

__all__ = ["MissingWeights", "PinnedFile", "Signal", "SignalSettings", "build_signals"]

SignalName = Literal[
    "size",
    "caption",
    "characters",
    "words",
    "concepts",
    "language",
    "exact",
    "perceptual",
    "sharpness",
    "faces",
    "text_area",
    "clip",
    "nsfw",
    "aesthetic",
    "clip_nsfw",
    "cluster",
]

_FILES: dict[str, tuple[str, ...]] = {
    "aesthetic": ("aesthetic_head",),
    "clip_nsfw": ("clip_nsfw_head",),
    "cluster": ("centroids", "wanted_clusters"),
}
"""The settings without which a signal on CLIP's embeddings can't be measured."""


class SignalSettings(BaseModel):
    """What to measure of each sample, and with which models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: tuple[SignalName, ...] = Field(
        default=("size", "caption", "characters", "words", "language", "exact", "perceptual", "clip", "nsfw"),
        description="Signals to measure; a policy can only use the columns of these. `faces` and `text_area` need the "
        "extras faces and ocr, the last three a file below.",
    )
    clip_model: str = Field(
        default="ViT-B-32",
        description="open_clip architecture, or `local-dir:` and a folder with open_clip_config.json, weights and "
        "tokenizer.",
    )
    clip_pretrained: str | None = Field(
        default="openai", description="open_clip tag of the weights, or a weights file; not used with local-dir."
    )
    phash_decode: Decoding = Field(
        default="full",
        description="How far JPEGs are decoded for the signal perceptual. scaled takes half of the time if neither "
        "exact, sharpness nor a model is measured, and moves a hash by at most 4 of 64 bits in all that was measured; "
        "full is imagehash's own.",
    )
    text_embedding: bool = Field(default=False, description="Keep CLIP's embedding of the caption too.")
    stop_words: str = Field(
        default="en", description="Language code of the package stop-words, or a text file, one word a line."
    )
    flagged_words: str | None = Field(
        default=None, description="Text file of words to keep out; empty for better-profanity's English list."
    )
    concept_entries: str | None = Field(
        default=None,
        description="Text file of concepts, one a line, for the signal concepts; empty for WordNet's lemmas.",
    )
    fold_concept_case: bool = Field(
        default=True, description="Match concepts in any case; MetaCLIP's own code does not."
    )
    aesthetic_head: PinnedFile | None = Field(
        default=None, description="LAION's sac+logos+ava1-l14-linearMSE.pth, for the signal aesthetic."
    )
    clip_nsfw_head: PinnedFile | None = Field(
        default=None, description="LAION's clip_autokeras_binary_nsfw as .pth or in its .zip, for the signal clip_nsfw."
    )
    centroids: PinnedFile | None = Field(
        default=None, description=".npy of shape (clusters, embedding size), for the signal cluster."
    )
    wanted_clusters: PinnedFile | None = Field(
        default=None, description=".npy of rows of the centroids to keep, for the signal cluster."
    )

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        for name, files in _FILES.items():
            lacking = [file for file in files if getattr(self, file) is None]
            if name in self.measure and lacking:
                raise ValueError(f"{name} is to be measured without {' and '.join(lacking)}; give file and sha256")
            if name in self.measure and "clip" not in self.measure:
                raise ValueError(f"{name} is measured from CLIP's image embedding; add clip to measure")
        return self


def build_signals(settings: SignalSettings) -> list[Signal]:
    """Return the signals that `settings` ask for, with no model loaded yet; each after the one it is measured from."""
    clip = Clip(settings.clip_model, settings.clip_pretrained, text_embedding=settings.text_embedding)
    every: list[Signal] = [
        Size(),
        CaptionStatistics(),
        Characters(),
        Words(settings.stop_words, settings.flagged_words),
        Concepts(settings.concept_entries, settings.fold_concept_case),
        Language(),
        ExactHashes(),
        PerceptualHash(settings.phash_decode),
        Sharpness(),
        Faces(),
        TextArea(),
        clip,
        Nsfw(),
    ]
    if settings.aesthetic_head:
        every.append(Aesthetic(clip, settings.aesthetic_head))
    if settings.clip_nsfw_head:
        every.append(ClipNsfw(clip, settings.clip_nsfw_head))
    if settings.centroids and settings.wanted_clusters:
        every.append(Cluster(clip, settings.centroids, settings.wanted_clusters))
    return [signal for signal in every if signal.name in settings.measure]
