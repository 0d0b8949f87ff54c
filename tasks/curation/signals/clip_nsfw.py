"""Probability that an image is not safe for work, by LAION's detector on its CLIP embedding."""

from dataclasses import dataclass

import pyarrow as pa

from storage.schema import column
from tasks.curation.signals.clip_head import ClipHead


@dataclass(frozen=True)
class ClipNsfw(ClipHead):
    """LAION's CLIP-based-NSFW-Detector: (x - mean) / sqrt(variance), then 768 to 64 to 512 to 256 to 1, ReLU, sigmoid.

    LAION, clip-retrieval and NeMo Curator cut at 0.5; DataComp trained its own and cut at 0.1.
    """

    name = "clip_nsfw"
    version = 1
    columns = pa.schema([column("clip_nsfw_score", pa.float32(), "probability of not safe for work, 0-1")])
