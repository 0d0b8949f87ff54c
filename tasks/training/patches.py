"""Cuts off the padding that Gemma 4's image processor puts behind each image's patches, as far as a batch allows.

Images are padded to the most patches any may have; where a batch's are all as long as each other nothing is masked, and
attention takes its fastest kernel.
"""

from typing import Any

PATCHES, POSITIONS = "pixel_values", "image_position_ids"
MULTIPLE = 36
"""Patches that remain are a multiple of this, so that compiled layers see few shapes: 4 tokens of 3 × 3 patches."""


def trim_patches(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch without the patches that pad all of its images; any other batch as it is.

    `pixel_values` is (images, patches, values), `image_position_ids` (images, patches, 2) with -1 where a patch pads.
    """
    if PATCHES not in batch or POSITIONS not in batch:
        return batch
    used = int((batch[POSITIONS] >= 0).all(dim=-1).sum(dim=1).max())
    kept = min(-(-used // MULTIPLE) * MULTIPLE, batch[POSITIONS].shape[1])
    return batch | {name: batch[name][:, :kept].contiguous() for name in (PATCHES, POSITIONS)}
