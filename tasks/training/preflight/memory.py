"""Check (h): the memory that the training is predicted to need at its peak, against what the device has."""

from dataclasses import replace
from pathlib import Path

import psutil
import torch
from torch import nn

from tasks.training.collate import IGNORED
from tasks.training.lengths import LengthError
from tasks.training.memory.estimate import IMAGE_TOKENS, LOADING, Estimate, MemoryModel, Workload
from tasks.training.memory.skeleton import skeleton_of
from tasks.training.model import ModelError, Placement
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.setup import Setup, checkpointed_share
from tasks.training.speed import is_compiled

MEMORY = "memory"
MARGIN = 0.05
"""Share of a GPU's memory left to the driver and to fragments that the allocator can't use."""
REMEDY = (
    "Lower batch_size and raise accumulation by the same factor, checkpoint more, set a lower max_image_tokens, share "
    "the model among more gpus (sharding: fsdp), or use a larger device."
)
LOADED_WHOLE = (
    "Each GPU loads a 4-bit model whole before they share it: write quantization: none, of which each loads its part "
    "only, or use larger GPUs."
)
FILLED = "; with more memory, fewer layers are computed again, and it is used"
KEPT_FREE = 0.2
"""Share of a device's memory left to activations, where all of a model is to be tried on it."""
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(setup: Setup) -> list[Finding]:
    """Compare the predicted peak with the memory of the GPU, or with what is free of the machine's without one.

    The prediction is that of a micro-batch of samples as long as the longest; of GPUs that share a model, that of each.
    What can't be predicted stops no training.
    """
    try:
        return [_predicted(setup)]
    except (LengthError, ModelError) as error:
        remedy = "Watch the first steps: if memory runs out, batches are computed in smaller pieces."
        return [Finding(MEMORY, "prediction", "noted", str(error), "a prediction that fits the device", remedy)]


def _predicted(setup: Setup) -> Finding:
    workload = largest_batch(setup)
    recipe = setup.recipe
    steps = recipe.max_steps or recipe.epochs * len(setup.examples) / workload.batch / recipe.accumulation
    shared = replace(setup.placement, sharding=recipe.sharding)  # the preflight itself is one process
    compiled = is_compiled(recipe, shared, int(steps * recipe.accumulation))
    model = MemoryModel(skeleton_of(setup.base.config, recipe), recipe, compiled=compiled)
    share = checkpointed_share(recipe, setup.placement)
    least = model.estimate(workload, checkpointed_share=share)
    is_more_used = recipe.checkpointed_share is None and share > 0
    return judge(least, workload, setup.placement.device, is_more_used=is_more_used)


def judge(estimate: Estimate, workload: Workload, device: torch.device, *, is_more_used: bool = False) -> Finding:
    """Return whether what is predicted fits a device; `is_more_used` says that the training takes more if it can."""
    on_gpu = device.type == "cuda"
    total = memory_of(device)
    limit = int(total * (1 - MARGIN))
    name = torch.cuda.get_device_name(device) if on_gpu else "free RAM"
    return Finding.judge(
        MEMORY,
        f"{workload.batch} samples of {workload.sample_tokens} tokens",
        estimate.peak_bytes <= limit,
        measured=f"predicted {estimate}{FILLED if is_more_used else ''}",
        wanted=f"at most {_gib(limit)} ({1 - MARGIN:.0%} of {_gib(total)} {name})",
        remedy=LOADED_WHOLE if estimate.moment == LOADING else REMEDY,
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


def has_room_for_all(model: nn.Module, placement: Placement) -> bool:
    """Whether one device could hold all of a model without 4-bit weights, and the gradients of what is trained.

    `model` may be without weights.
    """
    needed = sum(weight.numel() * (1 + weight.requires_grad) for weight in model.parameters())
    return needed * placement.dtype.itemsize <= memory_of(placement.device) * (1 - KEPT_FREE)


def memory_of(device: torch.device) -> int:
    """Return the bytes of a GPU, or those of the machine's that are free."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return free_memory()


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
