"""Splits over the life of a dataset: what must hold whatever arrives."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.schema import PUBLISHED
from tasks.curation.duplicates import Edges, Evidence
from tasks.curation.policy import Splits
from tasks.curation.splits import SPLITS, assign_splits

EVEN = Splits(validation=0.3, test=0.3)
"""Large shares, so that every split is common in small pools."""


def evidence_of(*pairs: tuple[str, str]) -> Evidence:
    ids = sorted({sample for pair in pairs for sample in pair})
    left, right = (np.array([ids.index(pair[at]) for pair in pairs], np.int32) for at in (0, 1))
    return Evidence(pa.array(ids, pa.string()), {"perceptual": Edges(left, right, np.full(len(pairs), 4, np.float32))})


def assign(samples, *, pairs=(), published=None, splits=EVEN) -> dict[str, str | None]:
    published = published or {}
    table = pa.table([list(published), list(published.values())], schema=PUBLISHED)
    column = pa.chunked_array([list(samples)], pa.string())
    found = assign_splits(column, evidence=evidence_of(*pairs), published=table, splits=splits)
    return dict(zip(samples, found.to_pylist(), strict=True))


def test_a_split_does_not_depend_on_the_order_of_rows_or_on_other_samples():
    samples = [f"{at:032x}" for at in range(200)]
    assert assign(samples) == assign(samples[::-1])
    assert assign(samples[:50]) == {sample: assign(samples)[sample] for sample in samples[:50]}


def test_shares_are_those_asked_for_and_another_seed_draws_others():
    samples = [f"{at:032x}" for at in range(20_000)]
    drawn = assign(samples, splits=Splits(validation=0.1, test=0.2))
    shares = {split: list(drawn.values()).count(split) / len(samples) for split in SPLITS}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.01)
    assert assign(samples, splits=Splits(validation=0.1, test=0.2, seed=1)) != drawn


def test_without_holdout_everything_is_train():
    assert set(assign([f"{at}" for at in range(100)], splits=Splits(validation=0, test=0)).values()) == {"train"}


def test_near_duplicates_share_a_split_through_samples_that_are_not_kept():
    # a ~ x ~ b: x was rejected, and still keeps a and b together
    for at in range(30):
        a, b, x = f"a{at}", f"b{at}", f"0{at}"
        drawn = assign([a, b], pairs=[(a, x), (b, x)])
        assert drawn[a] == drawn[b]


def test_a_published_sample_stays_and_new_near_duplicates_join_it():
    for split in SPLITS:
        drawn = assign(["new", "old"], pairs=[("new", "old")], published={"old": split})
        assert drawn == {"new": split, "old": split}


def test_a_changed_seed_or_share_moves_no_published_sample():
    samples = [f"{at}" for at in range(100)]
    first = assign(samples)
    assert assign(samples, published=first, splits=Splits(validation=0, test=0.5, seed=9)) == first


def test_groups_that_new_evidence_connects_follow_the_strongest_and_the_weaker_are_left_out():
    published = {"t": "train", "v": "validation", "e": "test"}
    drawn = assign(["t", "v", "e", "new"], pairs=[("new", "t"), ("new", "v"), ("new", "e")], published=published)
    assert drawn == {"t": None, "v": None, "e": "test", "new": "test"}
    drawn = assign(["t", "v", "new"], pairs=[("new", "t"), ("new", "v")], published=published)
    assert drawn == {"t": None, "v": "validation", "new": "validation"}


ids = st.integers(0, 11).map(lambda at: f"{at:02}")
rounds = st.lists(
    st.tuples(st.sets(ids), st.lists(st.tuples(ids, ids).filter(lambda pair: pair[0] < pair[1]), max_size=4)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(rounds)
def test_over_any_history_no_sample_ever_changes_split_and_no_group_straddles_one(history):
    published: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    for kept, more in history:
        pairs += more  # evidence only grows
        drawn = assign(sorted(kept), pairs=pairs, published=published)
        for sample, split in drawn.items():
            assert split is None or published.get(sample, split) == split
        published |= {sample: split for sample, split in drawn.items() if split}
        group = {sample: sample for sample in published}
        for _ in range(12):  # spread the smallest name through the pairs until nothing changes
            for one, other in pairs:
                smallest = min(group.get(one, one), group.get(other, other))
                group[one] = group[other] = smallest
        splits_of: dict[str, set[str]] = {}
        for sample, split in drawn.items():
            if split:
                splits_of.setdefault(group[sample], set()).add(split)
        assert all(len(found) == 1 for found in splits_of.values())
