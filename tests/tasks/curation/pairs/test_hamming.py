"""Hamming pairs against comparing every two codes."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.curation.pairs import bands
from tasks.curation.pairs.bands import band_allowances
from tasks.curation.pairs.hamming import TooManyPairsError, hamming_pairs


def every_pair(codes, max_distance, new_from=0):
    """The oracle: all index pairs by brute force, as rows of (left, right, distance)."""
    distance = np.bitwise_count(codes[:, None] ^ codes[None, :])
    left, right = np.nonzero(np.triu(distance <= max_distance, 1))
    rows = np.stack([left, right, distance[left, right]], axis=1)
    return rows[rows[:, 1] >= new_from]


def assert_exact(codes, max_distance, new_from=0):
    found = hamming_pairs(codes, max_distance=max_distance, new_from=new_from)
    expected = every_pair(codes, max_distance, new_from)
    np.testing.assert_array_equal(np.stack(found, axis=1).reshape(-1, 3), expected)
    return len(expected)


def flipped(rng, codes, bits):
    """Copies of codes with up to `bits` bits flipped at random."""
    for _ in range(bits):
        codes = codes ^ np.where(
            rng.random(len(codes)) < 0.7, np.uint64(1) << rng.integers(0, 64, len(codes), np.uint64), 0
        )
    return codes


def random(rng):
    return rng.integers(0, 2**64, 1500, np.uint64)


def planted(rng, flips=6):
    codes = rng.integers(0, 2**64, 700, np.uint64)
    return rng.permutation(np.concatenate([codes, flipped(rng, codes, flips), codes[:50]]))


def low_entropy(rng):
    return rng.integers(0, 2**11, 900, np.uint64) << np.uint64(30)


def correlated(rng):
    """The upper half repeats the lower, so that distances are even and keys say half of what they seem to."""
    low = rng.integers(0, 2**12, 800, np.uint64)
    return low | low << np.uint64(32)


def one_dense_cluster(rng):
    codes = rng.integers(0, 2**64, 800, np.uint64)
    codes[::2] = codes[0] & ~np.uint64(255) | rng.integers(0, 256, 400, np.uint64)
    return codes


def all_equal(rng):
    return np.full(200, 2**63 + 1, np.uint64)


def one(rng):
    return np.array([7], np.uint64)


def none(rng):
    return np.zeros(0, np.uint64)


@pytest.mark.parametrize("max_distance", [0, 1, 2, 3, 4, 8, 64])
@pytest.mark.parametrize(
    "draw",
    [random, planted, low_entropy, correlated, one_dense_cluster, all_equal, one, none],
    ids=lambda f: f.__name__,
)
def test_every_pair_within_the_distance_is_found_and_no_other(draw, max_distance):
    codes = draw(np.random.default_rng(0))
    pairs = assert_exact(codes[:300] if max_distance == 64 else codes, max_distance)
    assert pairs > 0 or draw in (random, one, none)


@pytest.mark.parametrize("max_distance", [0, 1, 4])
@pytest.mark.parametrize("draw", [planted, low_entropy, one_dense_cluster, all_equal], ids=lambda f: f.__name__)
def test_new_against_all_finds_the_pairs_that_end_in_a_new_code(draw, max_distance):
    codes = draw(np.random.default_rng(1))
    for new_from in (0, 1, len(codes) // 2, len(codes) - 3, len(codes)):
        assert_exact(codes, max_distance, new_from)


@pytest.mark.parametrize("max_distance", range(11))
@pytest.mark.parametrize("new_from", [0, 1000, 1440, 1445])
def test_codes_that_are_compared_by_bands_give_the_same_pairs_at_every_distance(monkeypatch, max_distance, new_from):
    monkeypatch.setattr(bands, "FEW", 0)
    codes = planted(np.random.default_rng(2), flips=12)
    assert assert_exact(codes, max_distance, new_from) > 0


@pytest.mark.parametrize("max_distance", [4, 7, 10])
@pytest.mark.parametrize("draw", [low_entropy, correlated, one_dense_cluster, all_equal], ids=lambda f: f.__name__)
def test_codes_whose_bits_depend_on_each_other_are_compared_by_bands_exactly(monkeypatch, draw, max_distance):
    monkeypatch.setattr(bands, "FEW", 0)
    assert assert_exact(draw(np.random.default_rng(3)), max_distance) > 0


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 64), st.lists(st.integers(0, 16), min_size=4, max_size=4))
def test_a_near_pair_is_near_in_some_band_and_with_less_allowance_would_not_be(max_distance, differing):
    allowances = band_allowances(max_distance)
    if sum(differing) <= max_distance:
        assert any(bits <= allowance for bits, allowance in zip(differing, allowances, strict=True))
    assert sum(allowance + 1 for allowance in allowances) == max_distance + 1


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 63), max_size=6),
    st.lists(st.lists(st.integers(0, 63), max_size=9), max_size=40),
    st.integers(0, 6),
    st.integers(0, 40),
)
def test_codes_around_a_few_centres_are_paired_exactly(centres, flips, max_distance, new_from):
    codes = np.zeros(len(flips), np.uint64)
    for place, bits in enumerate(flips):
        code = (0x9E3779B97F4A7C15 * (centres[place % len(centres)] if centres else 0)) % 2**64
        for bit in bits:
            code ^= 1 << bit
        codes[place] = code
    assert_exact(codes, max_distance, new_from)


def faiss_pairs(codes, max_distance):
    index = faiss.IndexBinaryFlat(64)
    packed = codes.view(np.uint8).reshape(-1, 8)
    index.add(packed)
    limits, _, neighbours = index.range_search(packed, max_distance + 1)  # faiss means less than
    rows = np.repeat(np.arange(len(codes)), np.diff(limits.astype(np.int64)))
    upper = rows < neighbours
    return set(zip(rows[upper].tolist(), neighbours[upper].tolist(), strict=True))


def test_codes_beyond_the_number_compared_with_all_pair_as_in_faiss_at_every_distance_to_10():
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 2**64, bands.FEW, np.uint64)
    codes = np.concatenate([codes, flipped(rng, codes[:4_000], 14)])
    for max_distance in range(5, 11):
        left, right, _ = hamming_pairs(codes, max_distance=max_distance)
        assert set(zip(left.tolist(), right.tolist(), strict=True)) == faiss_pairs(codes, max_distance), max_distance


def test_of_a_million_random_codes_only_the_planted_pairs_are_near():
    codes = np.random.default_rng(6).integers(0, 2**64, 1_000_000, np.uint64)
    codes[-1000:] = flipped(np.random.default_rng(7), codes[:1000], 4)
    left, right, distance = hamming_pairs(codes)
    np.testing.assert_array_equal(left, np.arange(1000))
    np.testing.assert_array_equal(right, np.arange(999_000, 1_000_000))
    np.testing.assert_array_equal(distance, np.bitwise_count(codes[:1000] ^ codes[-1000:]))


def test_too_many_equal_codes_to_list_are_counted_instead():
    codes = np.zeros(300_000, np.uint64)
    with pytest.raises(TooManyPairsError, match="44,999,850,000 pairs follow from 300,000 items"):
        hamming_pairs(codes)


@pytest.mark.parametrize("codes", [np.zeros(3, np.int64), np.zeros((2, 2), np.uint64), np.zeros(3, np.float64)])
def test_what_is_not_a_flat_array_of_codes_is_refused(codes):
    with pytest.raises(ValueError, match=r"codes are \w+ of shape"):
        hamming_pairs(codes)


@pytest.mark.parametrize("max_distance", [-1, 65])
def test_distances_that_64_bits_cant_have_are_refused(max_distance):
    with pytest.raises(ValueError, match="Use 0 to 64 bits"):
        hamming_pairs(np.zeros(3, np.uint64), max_distance=max_distance)
