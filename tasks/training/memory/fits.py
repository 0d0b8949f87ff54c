"""Says how a training can be laid out on a GPU of a given size so that it fits and is as fast as that allows."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tasks.training.memory.estimate import IMAGE_TOKENS, Estimate, MemoryModel, Workload, estimate
from tasks.training.memory.skeleton import skeleton_of
from tasks.training.recipe import Recipe

log = logging.getLogger(__name__)

FREE_SHARE = 0.1
"""Share of a GPU that is left to the CUDA context, to what the allocator can't use, and to the prediction's error."""

IMAGE_TOKEN_CHOICES = (70, 140, 280, 560, 1120)
"""Bounds on an image's tokens that Gemma 4's image processor accepts."""

FIXED_TOKENS = 200
"""Tokens whose computation takes as long as a micro-batch's fixed cost, which is mostly unpacking 4-bit weights.

On an H100, unpacking takes 22 ms of a pass over a 31B model, and a token's share of the pass 0.11 ms.
"""


@dataclass(frozen=True)
class Proposal:
    """A way to lay out a training that fits, with the memory it is predicted to take.

    `relative_time` is what a token takes, 1 being a micro-batch without end of which nothing is computed again.
    """

    batch_size: int
    accumulation: int
    checkpointed_share: float
    max_image_tokens: int | None
    tokens_per_batch: int
    estimate: Estimate

    @property
    def relative_time(self) -> float:
        """Passes through the layers per token, more for small micro-batches."""
        return (2 + self.checkpointed_share) / 2 * (1 + FIXED_TOKENS / self.tokens_per_batch)


def what_fits(
    config: PretrainedConfig,
    recipe: Recipe,
    device_bytes: int,
    *,
    sample_tokens: int,
    images: int = 1,
    supervised_tokens: int = 64,
    compiled: bool = True,
) -> list[Proposal]:
    """Return the fastest layout that fits `device_bytes` for each bound on image tokens, fewest tokens first.

    All keep the recipe's samples per optimizer step. `sample_tokens` is the padded length of a sample with images as
    the recipe bounds them; other bounds change it. An empty list means that nothing fits.
    """
    model = MemoryModel(skeleton_of(config, recipe), recipe, compiled=compiled)
    current = recipe.max_image_tokens or IMAGE_TOKENS
    varies = images and hasattr(getattr(config, "vision_config", None), "pooling_kernel_size")
    proposals = []
    for bound in IMAGE_TOKEN_CHOICES if varies else (current,):
        tokens = sample_tokens + images * (bound - current)
        workload = Workload(1, max(tokens, 1), images, bound, supervised_tokens)
        layouts = _layouts(model, recipe, device_bytes, workload, bound if varies else recipe.max_image_tokens)
        if best := min(layouts, key=lambda proposal: proposal.relative_time, default=None):
            proposals.append(best)
    return proposals


def checkpointed_share_for(
    config: PretrainedConfig,
    recipe: Recipe,
    device_bytes: int,
    *,
    batch: int,
    sample_tokens: int,
    images: int = 1,
    image_tokens: int | None = None,
    supervised_tokens: int = 64,
    compiled: bool = True,
) -> float:
    """Return the smallest share of the language model's layers (0-1) to compute again so that the training fits.

    It is 1 if not even that is predicted to fit. The micro-batch is that of `estimate`.
    """
    model = MemoryModel(skeleton_of(config, recipe), recipe, compiled=compiled)
    tokens = image_tokens or recipe.max_image_tokens or IMAGE_TOKENS
    workload = Workload(batch, sample_tokens, images, tokens, supervised_tokens)
    share = smallest_share(model, workload, device_bytes)
    return 1.0 if share is None else share


def smallest_share(model: MemoryModel, workload: Workload, device_bytes: int) -> float | None:
    """Return the smallest share of layers to compute again with which the workload fits; None if it never does."""
    layers = model.language_layers(workload)
    usable = device_bytes * (1 - FREE_SHARE)
    low, high = 0, layers + 1
    while low < high:  # the peak falls with every layer more
        middle = (low + high) // 2
        if middle > layers or model.estimate(workload, checkpointed_share=middle / layers).peak_bytes <= usable:
            high = middle
        else:
            low = middle + 1
    return low / layers if low <= layers else None


def _layouts(
    model: MemoryModel, recipe: Recipe, device_bytes: int, sample: Workload, bound: int | None
) -> Iterator[Proposal]:
    """Every micro-batch that divides the samples of a step, with as little computed again as lets it fit."""
    samples = recipe.batch_size * recipe.accumulation
    for batch in (size for size in range(1, samples + 1) if samples % size == 0):
        accumulation = samples // batch
        if accumulation % recipe.gpus:
            continue
        workload, split = replace(sample, batch=batch), model.with_accumulation(accumulation)
        share = smallest_share(split, workload, device_bytes)
        if share is None:
            return  # larger ones take more
        found = split.estimate(workload, checkpointed_share=share)
        yield Proposal(batch, accumulation, share, bound, workload.tokens, found)


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Side of the child process: `config` has `what_fits`' arguments, the recipe and the path of a config.json.

    Returns the proposals, and `least`: what the layout that takes least is predicted to take.
    """
    model = AutoConfig.from_pretrained(config["config"], trust_remote_code=False)
    recipe = Recipe.model_validate(config["recipe"])
    sample = {name: config[name] for name in ("sample_tokens", "images", "supervised_tokens")}
    log.info("rehearsing layers of %s on no device", model.model_type)
    found = what_fits(model, recipe, config["device_bytes"], **sample)
    return {
        "proposals": [asdict(proposal) | {"relative_time": proposal.relative_time} for proposal in found],
        "least": str(estimate(model, recipe, batch=1, **sample)),
    }
