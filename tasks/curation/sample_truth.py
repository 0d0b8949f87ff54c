"""What is really wrong with each sample of the offline pool, and how well a run of filters found it.

`write_sample` plants the faults and records them here; `score_filters` compares a run's decisions with that record.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

TRUTH_FILE = "truth.jsonl"

QUARANTINE = "quarantine"
KEPT = "kept"

FILTERS: Mapping[str, tuple[str, ...]] = {
    "byte_copy": ("exact",),
    "reencoded_copy": ("exact", "perceptual"),  # a lossless copy has the same pixels
    "resized_copy": ("perceptual",),
    "semantic_copy": ("semantic",),
    "mismatched_caption": ("clip",),
    "filename_caption": ("caption_text",),
    "url_caption": ("caption_text",),
    "boilerplate_caption": ("caption_text",),
    "long_caption": ("words",),
    "short_caption": ("words",),
    "foreign_caption": ("english",),
    "small_image": ("side",),
    "extreme_aspect": ("aspect",),
    "truncated_file": (QUARANTINE,),
    "bogus_file": (QUARANTINE,),
    "empty_file": (QUARANTINE,),
    "caption_not_utf8": (QUARANTINE,),
    "decompression_bomb": (QUARANTINE,),
    "cmyk": (KEPT,),
    "exif_rotated": (KEPT,),
    "palette": (KEPT,),
    "animated": (KEPT,),
    "grayscale": (KEPT,),
}
"""What should become of each planted oddity: conditions and duplicate rules of the sample's policy, `QUARANTINE` or
`KEPT`."""

DUPLICATE_RULES = frozenset({"exact", "perceptual", "semantic"})
"""Those of the names in `FILTERS` that are duplicate rules."""

MODEL_JUDGED = frozenset({"mismatched_caption", "foreign_caption", "semantic_copy"})
"""Faults that only a model can see; finding the others takes no judgement, so their recall should be 1."""


@dataclass(frozen=True)
class PlantedSample:
    """The truth about one sample.

    `oddity` is a key of `FILTERS`, or None for an everyday sample. Copies and their original share `group`, the
    original's key.
    """

    key: str
    shard: str
    oddity: str | None
    group: str | None
    answer: str

    @property
    def is_faulty(self) -> bool:
        """Whether some filter should reject the sample."""
        return self.oddity is not None and FILTERS[self.oddity] != (KEPT,)


@dataclass(frozen=True)
class SampleTruth:
    """The truth about every sample of a pool in `folder`."""

    folder: Path
    samples: tuple[PlantedSample, ...]

    @property
    def source(self) -> str:
        """A glob for the pool's tars, for `ingest`."""
        return str(self.folder / "*.tar")

    def write(self) -> None:
        """Write the truth beside the tars."""
        lines = [json.dumps(asdict(sample)) + "\n" for sample in self.samples]
        (self.folder / TRUTH_FILE).write_text("".join(lines))

    @classmethod
    def read(cls, folder: Path) -> "SampleTruth":
        """Read what `write` wrote; raises `FileNotFoundError` where no sample was written."""
        lines = (folder / TRUTH_FILE).read_text().splitlines()
        return cls(folder, tuple(PlantedSample(**json.loads(line)) for line in lines))


@dataclass(frozen=True)
class SampleDecision:
    """What a run made of one sample: every failed condition, the surviving copy's key and the rule that joined the two,
    or that it could not be read.
    """

    key: str
    kept: bool
    failed: tuple[str, ...] = ()
    duplicate_of: str | None = None
    duplicate_rule: str | None = None
    quarantined: bool = False


@dataclass(frozen=True)
class FilterScore:
    """How one kind of planted oddity fared.

    `recall` is found / planted. `precision` is that of the filter: of all the samples it rejected, the share with any
    planted fault; rejecting a fault-free sample lowers it. None where nothing was rejected, or nothing should be.
    """

    oddity: str
    filters: tuple[str, ...]
    planted: int
    found: int
    rejected: int
    wrongly_rejected: int

    @property
    def recall(self) -> float:
        """Share of the planted samples that the filter found, 0–1."""
        return self.found / self.planted

    @property
    def precision(self) -> float | None:
        """Share of the filter's rejections that were planted faults, 0–1."""
        return 1 - self.wrongly_rejected / self.rejected if self.rejected else None

    @property
    def deterministic(self) -> bool:
        """Whether finding this takes no model's judgement."""
        return self.oddity not in MODEL_JUDGED


def score_filters(truth: SampleTruth, decisions: Iterable[SampleDecision]) -> list[FilterScore]:
    """Score each kind of oddity that was planted, in the order of `FILTERS`.

    A copy counts as found when the right rule rejected either it or another member of its group as the duplicate of the
    other; a duplicate rejection is wrong when the two share no group. A sample without a decision counts as not found.
    """
    decided = {decision.key: decision for decision in decisions}
    planted = {sample.key: sample for sample in truth.samples}
    rejections = _rejections(planted, decided)
    scores = []
    for oddity, filters in FILTERS.items():
        samples = [sample for sample in truth.samples if sample.oddity == oddity]
        if not samples:
            continue
        if filters == (KEPT,):
            found = sum(sample.key in decided and decided[sample.key].kept for sample in samples)
            scores.append(FilterScore(oddity, filters, len(samples), found, 0, 0))
            continue
        caught = {key: is_wrong for name in filters for key, is_wrong in rejections.get(name, {}).items()}
        found = sum(sample.key in caught for sample in samples)
        if DUPLICATE_RULES.issuperset(filters):
            survivors = {decided[key].duplicate_of for key, is_wrong in caught.items() if not is_wrong}
            found = sum(sample.key in caught or sample.key in survivors for sample in samples)
        scores.append(FilterScore(oddity, filters, len(samples), found, len(caught), sum(caught.values())))
    return scores


def _rejections(
    planted: Mapping[str, PlantedSample], decided: Mapping[str, SampleDecision]
) -> dict[str, dict[str, bool]]:
    """By filter, the keys that it rejected and whether that was wrong."""
    rejections: dict[str, dict[str, bool]] = {}
    for key, decision in decided.items():
        sample = planted[key]
        for name in decision.failed:
            rejections.setdefault(name, {})[key] = not sample.is_faulty
        if decision.quarantined:
            rejections.setdefault(QUARANTINE, {})[key] = not sample.is_faulty
        if decision.duplicate_of is not None and decision.duplicate_rule is not None:
            other = planted[decision.duplicate_of]
            is_wrong = sample.group is None or sample.group != other.group
            rejections.setdefault(decision.duplicate_rule, {})[key] = is_wrong
    return rejections
