"""Small networks on CLIP embeddings, and how their weights are read: as tensors only, never as code."""

import io
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from tasks.curation.signals.contract import MissingWeights

_loaded: dict[tuple[str, str], nn.Module] = {}
_loading = threading.Lock()


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor (`sac+logos+ava1-l14-linearMSE.pth`): linear layers, dropout only in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(768, 1024), nn.Dropout(0.2)),
            *(nn.Linear(1024, 128), nn.Dropout(0.2)),
            *(nn.Linear(128, 64), nn.Dropout(0.1)),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return one score an embedding; (images, 768) in, (images, 1) out."""
        out: torch.Tensor = self.layers(embeddings)
        return out


class Normalization(nn.Module):
    """Subtracts a stored mean and divides by the root of a stored variance."""

    mean: torch.Tensor
    variance: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return normalised embeddings."""
        return (embeddings - self.mean) / self.variance.sqrt()


class SafetyHead(nn.Module):
    """LAION's CLIP-based-NSFW-Detector for ViT-L/14, as NeMo Curator ported it from Keras."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Normalization(768)
        self.linear_1 = nn.Linear(768, 64)
        self.linear_2 = nn.Linear(64, 512)
        self.linear_3 = nn.Linear(512, 256)
        self.linear_4 = nn.Linear(256, 1)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return one probability an embedding; (images, 768) in, (images, 1) out."""
        hidden = torch.relu(self.linear_1(self.norm(embeddings)))
        hidden = torch.relu(self.linear_3(torch.relu(self.linear_2(hidden))))
        return torch.sigmoid(self.linear_4(hidden))


HEADS: dict[str, type[nn.Module]] = {"aesthetic": AestheticHead, "clip_nsfw": SafetyHead}
"""The network by the name of the signal."""


def score(head: str, weights: Path, sha256: str, embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the head's number for each embedding; float32 of shape (images, 768) in, of shape (images,) out.

    Raises `MissingWeights` if the file holds other tensors than the head's.
    """
    with _loading:
        if (head, sha256) not in _loaded:
            _loaded[head, sha256] = _load(head, weights)
    with torch.inference_mode():
        found: npt.NDArray[np.float32] = _loaded[head, sha256](torch.from_numpy(embeddings))[:, 0].numpy()
    return found


def _load(head: str, weights: Path) -> nn.Module:
    network = HEADS[head]()
    wanted = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in network.state_dict().items())
    try:
        state: Any = torch.load(_unpacked(weights), map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except Exception as error:  # damaged files raise nearly anything
        reason = " ".join(str(error).split())[:500]
        raise MissingWeights(
            f"{weights}: does not hold the weights of the {head} head: {reason}. Give a PyTorch state dict of {wanted}."
        ) from error
    return network.eval()


def _unpacked(weights: Path) -> Path | io.BytesIO:
    """The file itself, or the one .pth file in an archive, as LAION publishes its safety head."""
    if zipfile.is_zipfile(weights):  # what torch.save writes is one, too
        with zipfile.ZipFile(weights) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".pth")]
            if len(inside) == 1:
                return io.BytesIO(archive.read(inside[0]))
    return weights
