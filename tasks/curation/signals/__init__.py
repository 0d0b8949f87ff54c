"""Signals: what can be measured of a sample, one class a file, and the settings that choose among them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.curation.signals.caption import CaptionStatistics
from tasks.curation.signals.clip import Clip
from tasks.curation.signals.contract import MissingWeights, Signal
from tasks.curation.signals.exact import ExactHashes
from tasks.curation.signals.language import Language
from tasks.curation.signals.nsfw import Nsfw
from tasks.curation.signals.perceptual import PerceptualHash
from tasks.curation.signals.size import Size

__all__ = ["MissingWeights", "Signal", "SignalSettings", "build_signals"]

SignalName = Literal["size", "caption", "language", "exact", "perceptual", "clip", "nsfw"]


class SignalSettings(BaseModel):
    """What to measure of each sample, and with which models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measure: tuple[SignalName, ...] = Field(
        default=("size", "caption", "language", "exact", "perceptual", "clip", "nsfw"),
        description="Signals to measure; a policy can only use the columns of these.",
    )
    clip_model: str = Field(
        default="ViT-B-32",
        description="open_clip architecture, or local-dir:<folder> with open_clip_config.json, weights and tokenizer.",
    )
    clip_pretrained: str | None = Field(
        default="openai", description="open_clip tag of the weights, or a weights file; not used with local-dir."
    )
    text_embedding: bool = Field(default=False, description="Keep CLIP's embedding of the caption too.")


def build_signals(settings: SignalSettings) -> list[Signal]:
    """Return the signals that `settings` ask for, with no model loaded yet."""
    every: list[Signal] = [
        Size(),
        CaptionStatistics(),
        Language(),
        ExactHashes(),
        PerceptualHash(),
        Clip(settings.clip_model, settings.clip_pretrained, text_embedding=settings.text_embedding),
        Nsfw(),
    ]
    return [signal for signal in every if signal.name in settings.measure]
