"""Suggested ε against counting, for every ε, what would be kept."""

from pathlib import Path

import numpy as np
import pytest

from storage.warehouse import Warehouse
from tasks.curation.epsilon import suggest_epsilon
from tests.tasks.curation.handmade import write_pairs, write_pool


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def written(warehouse, *, count=200, seed=0):
    """A pool and the pairs of random points on a line, with their positions by id."""
    places = np.random.default_rng(seed).uniform(0, 4, count)
    ids = [f"{at:04}" for at in range(count)]
    pairs = [
        (ids[i], ids[j], abs(places[i] - places[j]))
        for i in range(count)
        for j in range(i + 1, count)
        if abs(places[i] - places[j]) < 0.1
    ]
    half = count // 2
    pool = write_pool(warehouse, {i: {} for i in ids[:half]}, {i: {} for i in ids[half:]})
    return pool, write_pairs(warehouse, "semantic", pairs), places


def kept_share(places, epsilon, rule):
    """The rules written out over points on a line, in the order of their ids."""
    kept: list[float] = []
    for at, place in enumerate(places):
        others = places[:at] if rule == "official" else np.array(kept)
        if not (np.abs(others - place) <= epsilon).any():
            kept.append(place)
    if rule == "components":
        return (1 + np.count_nonzero(np.diff(np.sort(places)) > epsilon)) / len(places)
    return len(kept) / len(places)


@pytest.mark.parametrize("rule", ["greedy", "official", "components"])
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8, 0.995])
def test_the_suggested_epsilon_keeps_the_share_asked_for(warehouse, rule, keep):
    pool, pairs, places = written(warehouse)
    epsilon = suggest_epsilon(pairs, pool, keep=keep, rule=rule, warehouse=warehouse)
    assert kept_share(places, epsilon + 1e-7, rule) == pytest.approx(keep, abs=0.006)  # one sample of 200


def test_no_duplicates_wanted_gone_needs_no_epsilon(warehouse):
    pool, pairs, _ = written(warehouse)
    assert suggest_epsilon(pairs, pool, keep=1, warehouse=warehouse) == 0


def test_a_share_that_the_stored_pairs_cant_reach_is_refused_with_what_they_can(warehouse):
    pool, pairs, _ = written(warehouse)
    with pytest.raises(ValueError, match=r"Not even distance 0\.1, .* leaves 0\.1% of pool pool: \d+\.\d% stay"):
        suggest_epsilon(pairs, pool, keep=0.001, warehouse=warehouse)
    with pytest.raises(ValueError, match="keep is 40"):
        suggest_epsilon(pairs, pool, keep=40, warehouse=warehouse)
