"""The funnel of the images in documents: that of images as samples, between those missing and those unmatched."""

from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from tasks.curation.funnel import Funnel, Stage
from tasks.curation.interleaved.policy import MISSING, UNMATCHED, DocumentPolicy


@dataclass(frozen=True)
class ImageCounts:
    """Image segments that have no image, and images that pass everything but are assigned to no text."""

    missing: int
    unmatched: int

    @classmethod
    def of(cls, nodes: pa.Table) -> "ImageCounts":
        """Count among rows of `NODE_DECISIONS`."""
        reasons = pc.list_flatten(nodes["failed"].filter(pc.equal(nodes["kind"], "image")))
        return cls(*(int(pc.sum(pc.equal(reasons, name)).as_py() or 0) for name in (MISSING, UNMATCHED)))

    def __add__(self, other: "ImageCounts") -> "ImageCounts":
        return ImageCounts(self.missing + other.missing, self.unmatched + other.unmatched)


def image_funnel(samples: Funnel, counts: ImageCounts, policy: DocumentPolicy) -> Funnel:
    """Return the funnel of all image segments: first those that are missing go, last those that no text gets.

    `samples` is the funnel of `policy.image_policy` over the images that are there.
    """
    missing = Stage(MISSING, "the image is there", counts.missing, counts.missing, samples.samples)
    kept = samples.kept - counts.unmatched
    least = policy.least_similarity
    rule = "goes to a text" + (f", similarity >= {least:g}" if least is not None else "")
    unmatched = Stage(UNMATCHED, rule, counts.unmatched, counts.unmatched, kept)
    return replace(
        samples,
        samples=samples.samples + counts.missing,
        kept=kept,
        conditions=(missing, *samples.conditions),
        limits=(*samples.limits, *([unmatched] if policy.order == "matched" else [])),
    )
