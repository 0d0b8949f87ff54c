"""How much of an image is written text, by the text detector of PP-OCRv6 through the package rapidocr."""

import importlib
import importlib.util
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from storage.fingerprint import file_digest
from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels
from tasks.curation.signals.contract import MissingWeights, Signal

LONGER_SIDE = 640
"""Side that larger images are reduced to, pixels."""

_WEIGHTS = "PP-OCRv6_det_small.onnx"

_loading = threading.Lock()


@dataclass(frozen=True)
class TextArea(Signal):
    """Areas that hold text, found and not read, in any script.

    The detector comes with the package rapidocr (Apache-2.0, models too); nothing is downloaded. Needs the extra
    `ocr`. About a second an image and core.
    """

    name = "text_area"
    version = 1
    needs = Needs.PIXELS
    columns = pa.schema(
        [
            column("text_boxes", pa.int32(), "lines of text found; null if the image can't be decoded"),
            column("text_area", pa.float32(), "share of the image that they cover, 0-1"),
        ]
    )

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`. Raises `MissingWeights` if rapidocr is not installed."""
        return {"longer_side": LONGER_SIDE, "weights": _digest()}

    def view(self, pixels: Pixels) -> tuple[int, float]:
        """Return the number of lines and the share of the image that they cover."""
        bgr = cv2.cvtColor(pixels.rgb, cv2.COLOR_RGB2BGR)
        found = _detector()(bgr, use_det=True, use_cls=False, use_rec=False).boxes
        boxes = [] if found is None else [np.round(box).astype(np.int32) for box in found]
        covered = np.zeros(bgr.shape[:2], np.uint8)
        if boxes:
            cv2.fillPoly(covered, boxes, 1)
        return len(boxes), float(covered.mean())

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        return pa.record_batch(
            [
                pa.array([view and view[at] for view in batch.views], field.type)
                for at, field in enumerate(self.columns)
            ],
            schema=self.columns,
        )


def _detector() -> Any:
    """Return rapidocr's engine, loaded once a process whichever thread asks first; threads may share it."""
    with _loading:
        return _engine()


@cache
def _engine() -> Any:
    one = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    return importlib.import_module("rapidocr").RapidOCR(
        params={
            "Global.log_level": "error",
            "Det.model_path": str(_weights()),  # without it, a damaged file would be replaced from the network
            "Det.limit_type": "max",
            "Det.limit_side_len": LONGER_SIDE,
            **one,  # one image a thread keeps all cores busy
        }
    )


def _weights() -> Path:
    spec = importlib.util.find_spec("rapidocr")
    file = Path(spec.origin or "").parent / "models" / _WEIGHTS if spec else None
    if file is None or not file.is_file():
        raise MissingWeights(f"text_area: {_WEIGHTS} of the package rapidocr is missing. Run: pip install tamis[ocr]")
    return file


@cache
def _digest() -> str:
    return file_digest(_weights())
