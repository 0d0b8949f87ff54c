"""The cover rule by itself, and what it promises: any history of growth ends in the pairs of one run from scratch."""

import tempfile

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.warehouse import Warehouse
from tasks.curation.pairs.compact import expand_pairs, read_pairs
from tasks.curation.pairs.coverage import Table, find_cover
from tasks.curation.pairs.exact import find_exact_pairs
from tasks.curation.pairs.perceptual import find_perceptual_pairs
from tests.tasks.curation.pairs.written import EXACT, PERCEPTUAL, exact_shard, perceptual_shard, pool, rows


def table(path, new, old=""):
    return Table(path, frozenset(new), frozenset(old))


def compared(tables):
    return {frozenset([one, other]) for t in tables for one in t.new for other in t.new | t.old}


def test_nothing_is_known_at_first():
    cover = find_cover("abc", [])
    assert (cover.paths, cover.new, cover.old) == ((), ("a", "b", "c"), ())


def test_growth_compares_the_new_with_all():
    cover = find_cover("abcd", [table("1", "ab"), table("2", "c", "ab")])
    assert (cover.paths, cover.new, cover.old) == (("1", "2"), ("d",), ("a", "b", "c"))


def test_a_pool_that_shrank_needs_nothing():
    cover = find_cover("bc", [table("1", "ab"), table("2", "c", "ab")])
    assert (cover.paths, cover.new, cover.old) == (("1", "2"), (), ())


def test_tables_of_other_pools_are_not_read():
    assert find_cover("ab", [table("1", "ab"), table("2", "cd"), table("3", "e", "ab")]).paths == ("1",)


def test_tables_that_say_nothing_more_are_not_read():
    assert find_cover("abc", [table("1", "ab"), table("2", "c", "ab"), table("3", "abc")]).paths == ("3",)


def test_pools_that_grew_apart_compare_the_smaller_with_the_larger():
    cover = find_cover("abcde", [table("1", "abc"), table("2", "de")])
    assert (cover.paths, cover.new, cover.old) == (("1", "2"), ("d", "e"), ("a", "b", "c"))


def test_shards_added_by_two_processes_at_once_are_compared_with_each_other_only():
    cover = find_cover("abcd", [table("1", "ab"), table("2", "c", "ab"), table("3", "d", "ab")])
    assert (cover.paths, cover.new, cover.old) == (("1", "2", "3"), ("c",), ("d",))


tables = st.lists(
    st.tuples(st.sets(st.sampled_from("abcdef"), min_size=1), st.sets(st.sampled_from("abcdef"))), max_size=8
)


@settings(max_examples=120, deadline=None)
@given(tables, st.sets(st.sampled_from("abcdef")))
def test_what_is_read_and_what_is_left_cover_every_pair_of_shards_once_made(made, shards):
    known = [table(str(at), new, old - new) for at, (new, old) in enumerate(made)]
    cover = find_cover(sorted(shards), known)
    wanted = {frozenset([one, other]) for one in shards for other in shards}
    read = [t for t in known if t.path in cover.paths]
    assert {*cover.new, *cover.old} <= shards
    assert compared(read) & wanted == compared(known) & wanted
    assert wanted <= compared([*read, table("more", cover.new, cover.old)])
    assert bool(cover.new) == bool(wanted - compared(known))
    after = find_cover(sorted(shards), [*known, table("more", cover.new, cover.old)])
    assert (after.new, after.old) == ((), ())


shards = st.lists(st.lists(st.integers(-1, 11), max_size=5), min_size=1, max_size=5)
history = st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None)
@given(shards, history, st.randoms(use_true_random=False))
def test_any_history_of_pools_gives_the_pairs_of_one_run_from_scratch(codes_of_shards, pools, random):
    count = sum(map(len, codes_of_shards))
    names = iter(random.sample([f"{i:032x}" for i in range(count)], count))
    codes = [{next(names): (None if code < 0 else code * 0x11) for code in shard} for shard in codes_of_shards]
    with tempfile.TemporaryDirectory() as folder:
        grown, fresh = Warehouse(f"{folder}/grown"), None
        for step, places in enumerate(pools):
            chosen = [place for place in sorted(places) if place < len(codes)]
            samples = {sample: code for place in chosen for sample, code in codes[place].items()}
            ids = pa.array(sorted(samples), pa.string())
            fresh = Warehouse(f"{folder}/fresh{step}")
            for find, expected in ((perceptual, near(samples, 2)), (exact, near(samples, 0))):
                results = [read_pairs(find(w, codes, chosen), w, ids=ids) for w in (grown, fresh)]
                assert results[0].equals(results[1])
                assert rows(expand_pairs(results[0])) == expected


def perceptual(warehouse, codes, places):
    written = [perceptual_shard(warehouse, f"s{place}", codes[place]) for place in places]
    return find_perceptual_pairs(pool(*written), PERCEPTUAL, max_distance=2, warehouse=warehouse).ref


def exact(warehouse, codes, places):
    written = [
        exact_shard(
            warehouse, f"s{place}", {s: (None if c is None else f"{c:064x}", None) for s, c in codes[place].items()}
        )
        for place in places
    ]
    return find_exact_pairs(pool(*written), EXACT, column="bytes_hash", warehouse=warehouse).ref


def near(samples, max_distance):
    """The oracle: every two samples compared."""
    ids = sorted(sample for sample, code in samples.items() if code is not None)
    found = [
        (one, other, (samples[one] ^ samples[other]).bit_count()) for i, one in enumerate(ids) for other in ids[i + 1 :]
    ]
    return [pair for pair in found if pair[2] <= max_distance]
