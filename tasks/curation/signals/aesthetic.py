"""How much people like to look at an image, by LAION's aesthetic predictor on its CLIP embedding."""

from dataclasses import dataclass

import pyarrow as pa

from storage.schema import column
from tasks.curation.signals.clip_head import ClipHead


@dataclass(frozen=True)
class Aesthetic(ClipHead):
    """LAION's improved aesthetic predictor, 768 to 1024 to 128 to 64 to 16 to 1 without activations.

    The score is as published, about 0 to 10; Data-Juicer divides it by 10, NeMo Curator does not.
    """

    name = "aesthetic"
    version = 1
    columns = pa.schema([column("aesthetic_score", pa.float32(), "about 0 to 10, more is nicer; not bounded")])
