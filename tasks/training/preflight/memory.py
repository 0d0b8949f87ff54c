"""Check (h): the memory that the training is predicted to need at its peak, against what the device has."""

from pathlib import Path

import psutil
import torch

from tasks.training.collate import IGNORED
from tasks.training.memory.estimate import IMAGE_TOKENS, Estimate, MemoryModel, Workload
from tasks.training.memory.skeleton import skeleton_of
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.setup import Setup, checkpointed_share
from tasks.training.speed import is_compiled

MEMORY = "memory"
MARGIN = 0.05
"""Share of a GPU's memory left to the driver and to fragments that the allocator can't use."""
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(setup: Setup) -> list[Finding]:
    """Compare the predicted peak with the memory of the GPU, or with what is free of the machine's without one.

    The prediction is that of a micro-batch of samples as long as the longest.
    """
    workload = largest_batch(setup)
    recipe = setup.recipe
    steps = recipe.max_steps or recipe.epochs * len(setup.examples) / workload.batch / recipe.accumulation
    compiled = is_compiled(recipe, setup.placement, int(steps * recipe.accumulation))
    model = MemoryModel(skeleton_of(setup.base.config, recipe), recipe, compiled=compiled)
    share = checkpointed_share(recipe, setup.placement)
    return [judge(model.estimate(workload, checkpointed_share=share), workload, setup.placement.device)]


def judge(estimate: Estimate, workload: Workload, device: torch.device) -> Finding:
    """Return whether what is predicted fits a device."""
    on_gpu = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else free_memory()
    limit = int(total * (1 - MARGIN))
    name = torch.cuda.get_device_name(device) if on_gpu else "free RAM"
    return Finding.judge(
        MEMORY,
        f"{workload.batch} samples of {workload.sample_tokens} tokens",
        estimate.peak_bytes <= limit,
        measured=f"predicted {estimate}",
        wanted=f"at most {_gib(limit)} ({1 - MARGIN:.0%} of {_gib(total)} {name})",
        remedy="Lower batch_size and raise accumulation by the same factor, checkpoint more, set a lower "
        "max_image_tokens, or use a larger device.",
    )


def largest_batch(setup: Setup) -> Workload:
    """Return a micro-batch of the training whose rows are as long as its longest row."""
    rows = setup.rows()
    lengths = setup.lengths
    supervised = [int((setup.collator([dict(row)])["labels"] != IGNORED).sum()) for row in rows]
    images = max(len(row["images"]) for row in rows)
    longest = int(lengths.max())
    budget = setup.recipe.tokens_per_batch
    batch = max(1, budget // longest) if budget else setup.recipe.batch_size
    tokens = setup.recipe.max_image_tokens or getattr(setup.processor, "image_seq_length", None) or IMAGE_TOKENS
    return Workload(batch, longest, images, int(tokens), max(supervised))


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
