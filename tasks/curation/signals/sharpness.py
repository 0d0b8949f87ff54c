"""How sharp an image is and how much there is to see: blurred, blank and nearly empty images have low values."""

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels
from tasks.curation.signals.contract import Signal

LONGER_SIDE = 512
"""Side that larger images are reduced to, pixels: the same blur is the same value whatever the camera's resolution."""


@dataclass(frozen=True)
class Sharpness(Signal):
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) and entropy of the luma, at most 512 pixels wide or high.

    NeMo Curator calls images with a variance under 100 blurred, at their full size. Images below 512 pixels are
    measured as they are. The Laplacian is the sum of the four neighbours less four times the pixel, edges mirrored.
    """

    name = "sharpness"
    version = 1
    needs = Needs.PIXELS
    columns = pa.schema(
        [
            column("laplacian_variance", pa.float32(), "variance of the luma's Laplacian, grey levels of 255 squared"),
            column("entropy", pa.float32(), "Shannon entropy of the luma's histogram, bits a pixel, 0-8"),
        ]
    )

    @property
    def parameters(self) -> dict[str, int]:
        """See `Signal.parameters`."""
        return {"longer_side": LONGER_SIDE}

    def view(self, pixels: Pixels) -> tuple[float, float]:
        """Return the variance of the Laplacian and the entropy."""
        luma = cv2.cvtColor(_reduced(pixels.rgb), cv2.COLOR_RGB2GRAY)
        shares = np.bincount(luma.ravel(), minlength=256) / luma.size
        present = shares[shares > 0]
        laplacian = cv2.Laplacian(luma, cv2.CV_16S)  # whole numbers from -1020 to 1020
        return float(laplacian.var()), max(0.0, float(-(present * np.log2(present)).sum()))

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        return pa.record_batch(
            [pa.array([view and view[at] for view in batch.views], pa.float32()) for at in range(2)],
            schema=self.columns,
        )


def _reduced(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width, _ = rgb.shape
    scale = LONGER_SIDE / max(height, width)
    if scale >= 1:
        return rgb
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(rgb, size, interpolation=cv2.INTER_AREA))
