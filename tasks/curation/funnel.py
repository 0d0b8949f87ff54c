"""The funnel of a decision: what each condition and duplicate rule takes away, as data and as a table.

Every sample carries all its reasons, so a condition's count does not depend on where it stands in the policy; only
the cumulative column does.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.curation.limits import ConceptCount

MAX_CONCEPTS = 100
"""Concepts that a funnel shows: those mentioned most."""


@dataclass(frozen=True)
class Stage:
    """One condition or duplicate rule: samples it rejects at all, those nothing else rejects, and those left after it.

    `rule` is the SQL or the pairs it is made of. A duplicate rule counts samples that pass every condition, a limit
    those that are no duplicates either.
    """

    name: str
    rule: str
    fails: int
    fails_alone: int
    remaining: int


@dataclass(frozen=True)
class Funnel:
    """All stages of a policy over a pool of `samples`, of which `kept` are left.

    `concepts` are those mentioned most by what came to a balance, with the samples that do before and after it.
    """

    policy: str
    samples: int
    kept: int
    conditions: tuple[Stage, ...]
    duplicates: tuple[Stage, ...]
    limits: tuple[Stage, ...] = ()
    concepts: tuple[ConceptCount, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All of them, in the order they take samples away."""
        return self.conditions + self.duplicates + self.limits

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Funnel":
        """Read what `as_dict` gave, as it lies in a decision's record."""
        stages = {
            key: tuple(Stage(**stage) for stage in content[key]) for key in ("conditions", "duplicates", "limits")
        }
        concepts = tuple(ConceptCount(**concept) for concept in content["concepts"])
        return cls(**{**content, **stages, "concepts": concepts})

    def as_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers for JSON."""
        return asdict(self)

    @property
    def counts(self) -> dict[str, int]:
        """The same figures by flat names, such as `fails.words` and `fails_alone.words`."""
        counts = {"samples": self.samples, "kept": self.kept}
        for stage in self.conditions:
            counts[f"fails.{stage.name}"] = stage.fails
            counts[f"fails_alone.{stage.name}"] = stage.fails_alone
            counts[f"remaining.{stage.name}"] = stage.remaining
        counts |= {f"duplicates.{stage.name}": stage.fails for stage in self.duplicates}
        counts |= {f"limits.{stage.name}": stage.fails for stage in self.limits}
        return counts


def count_funnel(
    policy: str,
    *,
    conditions: Sequence[tuple[str, str]],
    rules: Sequence[tuple[str, str]],
    failed: NDArray[np.uint64],
    taken_by: NDArray[np.integer],
    limits: Sequence[tuple[str, str]] = (),
    limited: NDArray[np.integer] | None = None,
    concepts: Sequence[ConceptCount] = (),
) -> Funnel:
    """Count the funnel of a pool; `conditions`, `rules` and `limits` are names with their text.

    `failed` has one bit for each condition and sample, the first condition lowest; `taken_by` the number of the rule
    that makes the sample a duplicate, `limited` that of the limit that leaves it out, or -1. Of `concepts`, the first
    `MAX_CONCEPTS` are kept.
    """
    reasons, times = np.unique(failed, return_counts=True)
    stages, open_bits = [], 0
    for at, (name, text) in enumerate(conditions):
        bit = np.uint64(1 << at)
        open_bits |= 1 << at
        stages.append(
            Stage(
                name,
                text,
                fails=int(times[(reasons & bit) != 0].sum()),
                fails_alone=int(times[reasons == bit].sum()),
                remaining=int(times[(reasons & np.uint64(open_bits)) == 0].sum()),
            )
        )
    remaining = int((failed == 0).sum())
    removed = np.bincount(taken_by[(failed == 0) & (taken_by >= 0)], minlength=len(rules)).tolist()
    if limited is not None:
        removed += np.bincount(limited[limited >= 0], minlength=len(limits)).tolist()
    last = []
    for (name, text), count in zip([*rules, *limits], removed, strict=True):
        remaining -= count
        last.append(Stage(name, text, fails=count, fails_alone=count, remaining=remaining))
    return Funnel(
        policy,
        len(failed),
        remaining,
        tuple(stages),
        tuple(last[: len(rules)]),
        tuple(last[len(rules) :]),
        tuple(concepts[:MAX_CONCEPTS]),
    )


def funnel_markdown(funnel: Funnel, what: str = "samples") -> str:
    """Return the funnel as a Markdown table; `what` is the word for what it counts."""
    share = f" ({funnel.kept / funnel.samples:.1%})" if funnel.samples else ""
    lines = [
        f"**{funnel.policy}** keeps {funnel.kept:,} of {funnel.samples:,} {what}{share}.",
        "",
        "| condition | passes if | fails | only this | remaining |",
        "|:--|:--|--:|--:|--:|",
    ]
    for stage in funnel.conditions:
        lines.append(_row(stage.name, f"`{cell(stage.rule)}`", stage.fails, stage.fails_alone, stage.remaining))
    for stage in funnel.duplicates:
        lines.append(
            _row(f"duplicate: {stage.name}", cell(stage.rule), stage.fails, stage.fails_alone, stage.remaining)
        )
    for stage in funnel.limits:
        lines.append(_row(f"limit: {stage.name}", cell(stage.rule), stage.fails, stage.fails_alone, stage.remaining))
    return "\n".join(lines) + "\n"


def _row(*cells: str | int) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in cells) + " |"


def count_overlap(reasons: Mapping[tuple[str, ...], int]) -> dict[tuple[str, str], int]:
    """Return how many samples fail both conditions, by their names; of one name twice, how many fail this one alone.

    `reasons` counts samples by all that they fail. Pairs that no sample fails are left out.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for names, count in reasons.items():
        for one in names:
            for other in names:
                if one != other or len(names) == 1:
                    counts[one, other] += count
    return dict(counts)


def with_values(sql: str, parameters: Mapping[str, float | str]) -> str:
    """Return SQL as people read it: with the parameters' values in place of their names."""
    return re.sub(r"\$([a-z][a-z0-9_]*)", lambda found: str(parameters.get(found[1], found[0])), sql)


def cell(text: str) -> str:
    """Return text on one line that stays in its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
