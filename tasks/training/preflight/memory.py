"""Check (h): the memory that the training is predicted to need at its peak, against what the device has."""

from pathlib import Path
from typing import Protocol

import psutil
import torch

from tasks.training.preflight.finding import Finding

MEMORY = "memory"
MARGIN = 0.05
"""Share of a GPU's memory left to the driver and to fragments that the allocator can't use."""
_CGROUP = Path("/sys/fs/cgroup")


class Estimate(Protocol):
    """What a memory model predicts of a training."""

    @property
    def peak_bytes(self) -> int:
        """Most bytes allocated at once."""


def check_memory(estimate: Estimate, device: torch.device) -> list[Finding]:
    """Compare a prediction with the memory of the GPU, or with what is free of the machine's if there is none."""
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else free_memory()
    limit = int(total * (1 - MARGIN))
    name = torch.cuda.get_device_name(device) if on_gpu else "free RAM"
    return [
        Finding.judge(
            MEMORY,
            "predicted peak",
            estimate.peak_bytes <= limit,
            measured=f"{_gib(estimate.peak_bytes)}",
            wanted=f"at most {_gib(limit)} ({1 - MARGIN:.0%} of {_gib(total)} {name})",
            remedy="Lower batch_size and raise accumulation by the same factor, checkpoint more, set a lower "
            "max_image_tokens, or use a larger device.",
        )
    ]


def free_memory() -> int:
    """Return the bytes that this process can still get: of the machine, and of its container if that has a limit."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
