"""How much of an image is written text, by the networks of PP-OCRv6 through the package rapidocr."""

import importlib
import importlib.util
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.fingerprint import file_digest
from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels
from tasks.curation.signals.contract import MissingWeights, Signal

LONGER_SIDE = 640
"""Side that larger images are reduced to, pixels."""

LEAST_PROBABILITY, LEAST_CHARACTERS = 0.5, 2
"""What must be read in a line for it to be legible. Round shapes are taken for a 0, an O or an 8, alone."""

_DETECTOR, _READER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"

_loading = threading.Lock()


@dataclass(frozen=True)
class TextArea(Signal):
    """Lines of text: those that the detector finds, and of them those that can be read.

    The detector knows all scripts but takes some textures and objects for text. The reader does not, but knows only
    Latin, Greek, Chinese and Japanese letters. Both come with the package rapidocr (Apache-2.0, models too); nothing is
    downloaded. Needs the extra `ocr`. Half a second an image and core.
    """

    name = "text_area"
    version = 1
    needs = Needs.PIXELS
    columns = pa.schema(
        [
            column("text_boxes", pa.int32(), "lines of text found; null if the image can't be decoded"),
            column("text_area", pa.float32(), "share of the image that they cover, 0-1"),
            column("legible_area", pa.float32(), "share that those cover in which letters can be read, 0-1"),
        ]
    )

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`. Raises `MissingWeights` if rapidocr is not installed."""
        return {
            "longer_side": LONGER_SIDE,
            "least": [LEAST_PROBABILITY, LEAST_CHARACTERS],
            "weights": [_digest(_DETECTOR), _digest(_READER)],
        }

    def view(self, pixels: Pixels) -> tuple[int, float, float]:
        """Return the values of the columns: pixels would take much more memory."""
        bgr = cv2.cvtColor(pixels.rgb, cv2.COLOR_RGB2BGR)
        engine = _engine()
        boxes = engine(bgr, use_det=True, use_cls=False, use_rec=False).boxes
        if boxes is None:
            return 0, 0.0, 0.0
        read = engine.recognize_txt(engine.crop_text_regions(bgr, boxes.astype(np.float32)))
        legible = [
            box
            for box, text, probability in zip(boxes, read.txts, read.scores, strict=True)
            if probability >= LEAST_PROBABILITY and len(text.strip()) >= LEAST_CHARACTERS
        ]
        return len(boxes), _share(boxes, bgr.shape[:2]), _share(legible, bgr.shape[:2])

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        return pa.record_batch(
            [
                pa.array([view and view[at] for view in batch.views], field.type)
                for at, field in enumerate(self.columns)
            ],
            schema=self.columns,
        )


def _share(boxes: Iterable[npt.NDArray[Any]], shape: tuple[int, ...]) -> float:
    """The share of an image of (height, width) that four-cornered boxes cover together."""
    covered = np.zeros(shape, np.uint8)
    for box in boxes:
        cv2.fillConvexPoly(covered, np.round(box).astype(np.int32), 1)
    return float(covered.mean())


def _engine() -> Any:
    """Return rapidocr's engine, made once a process whichever thread asks first; threads may share it."""
    with _loading:
        return _make_engine()


@cache
def _make_engine() -> Any:
    return importlib.import_module("rapidocr").RapidOCR(
        params={
            "Global.log_level": "error",
            "Det.model_path": str(_weights(_DETECTOR)),  # without it, a damaged file would be replaced from the network
            "Rec.model_path": str(_weights(_READER)),
            "Det.limit_type": "max",
            "Det.limit_side_len": LONGER_SIDE,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,  # one image a thread keeps all cores busy
        }
    )


def _weights(name: str) -> Path:
    spec = importlib.util.find_spec("rapidocr")
    file = Path(spec.origin or "").parent / "models" / name if spec else None
    if file is None or not file.is_file():
        raise MissingWeights(f"text_area: {name} of the package rapidocr is missing. Run: pip install tamis[ocr]")
    return file


@cache
def _digest(name: str) -> str:
    return file_digest(_weights(name))
