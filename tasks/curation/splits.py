"""Splits: which groups of duplicates are held out, the same for ever once a sample was published.

A group is everything that pairs of any kind connect, up to a distance at which they are near-duplicates without doubt,
so these never straddle a split, also where a policy keeps several of them.
"""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.curation.duplicate_joins import Evidence
from tasks.curation.policy import Splits

SPLITS = ("train", "validation", "test")
"""In order of strength: a group with members published in several splits belongs to the last of them."""

REACH = {"perceptual": 4, "semantic": 0.01}
"""Bits and 1 - cosine up to which pairs make groups: with all that are stored, chains would join half of a pool."""

NONE = -1


def assign_splits(
    sample_ids: pa.ChunkedArray, *, evidence: Evidence, published: pa.Table, splits: Splits
) -> pa.StringArray:
    """Return the split of each sample, or null for a sample that must be left out.

    `published` says which split each sample was ever published in (`sample_id`, `split`). A group that was published
    keeps its split, and new samples join it; test wins over validation, and both over train, if new evidence connects
    groups of several splits. A sample published in a weaker split than its group has now is left out: it must not
    stay, next to its near-duplicates held out, nor move, since it may have been trained on or tuned on. Groups never
    published are drawn by a hash of their smallest id and the seed.
    """
    before = pc.index_in(published["split"], value_set=pa.array(SPLITS))
    own = _look_up(sample_ids, published["sample_id"], np.asarray(before))
    component, strongest = _groups(evidence, published["sample_id"], np.asarray(before))
    position = evidence.find(sample_ids)
    is_paired = position >= 0
    of_group = own.copy()
    of_group[is_paired] = strongest[component[position[is_paired]]]
    split = of_group.copy()
    is_new = np.flatnonzero(of_group == NONE)
    named_by = sample_ids.take(pa.array(is_new)).to_pylist()
    paired = np.flatnonzero(is_paired[is_new])
    smallest = evidence.ids.take(pa.array(component[position[is_new[paired]]])).to_pylist()
    for at, name in zip(paired.tolist(), smallest, strict=True):
        named_by[at] = name
    split[is_new] = [draw_split(name, splits) for name in named_by]
    must_leave = (own != NONE) & (own != split)
    return pa.array(SPLITS).take(pa.array(split, mask=must_leave))


def draw_split(group: str, splits: Splits) -> int:
    """Return the number in `SPLITS` of a group never published, a function of its name and the seed alone."""
    digest = hashlib.sha256(f"{splits.seed}:{group}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return 1 if share < splits.validation else 2 if share < splits.validation + splits.test else 0


def _groups(
    evidence: Evidence, published_ids: pa.ChunkedArray, before: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Each paired sample's component, and by component the strongest split any member was published in."""
    component = evidence.components(REACH)
    strongest = np.full(len(component), NONE, np.int32)
    position = evidence.find(published_ids)
    is_paired = position >= 0
    np.maximum.at(strongest, component[position[is_paired]], before[is_paired])
    return component, strongest


def _look_up(sample_ids: pa.ChunkedArray, known: pa.ChunkedArray, values: NDArray[np.int32]) -> NDArray[np.int32]:
    found = np.asarray(pc.fill_null(pc.index_in(sample_ids, value_set=known.combine_chunks()), NONE))
    return np.where(found == NONE, NONE, np.append(values, NONE)[found]).astype(np.int32)
