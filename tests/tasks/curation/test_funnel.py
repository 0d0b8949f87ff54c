"""The funnel against counting by hand."""

import numpy as np
import pytest

from tasks.curation.funnel import Funnel, Stage, count_funnel, funnel_markdown


@pytest.fixture
def funnel() -> Funnel:
    # eight samples: four fail nothing, of which two are duplicates; a fails, b fails, both fail (twice)
    return count_funnel(
        "p",
        conditions=[("a", "x > 1"), ("b", "x | y > 2")],
        rules=[("exact", "bytes"), ("near", "perceptual")],
        failed=np.array([0, 0, 0, 0, 1, 2, 3, 3], np.uint64),
        taken_by=np.array([-1, 1, 0, -1, 0, -1, 1, -1]),
    )


def test_a_condition_counts_all_it_fails_what_fails_only_it_and_what_is_left(funnel):
    assert funnel.conditions == (Stage("a", "x > 1", 3, 1, 5), Stage("b", "x | y > 2", 3, 1, 4))


def test_duplicates_count_only_samples_that_pass_every_condition(funnel):
    assert [(s.name, s.fails, s.remaining) for s in funnel.duplicates] == [("exact", 1, 3), ("near", 1, 2)]
    assert (funnel.samples, funnel.kept) == (8, 2)


def test_the_64th_condition_is_counted():
    many = [(f"c{i}", "") for i in range(64)]
    funnel = count_funnel(
        "p", conditions=many, rules=[], failed=np.array([1 << 63, 0], np.uint64), taken_by=np.array([-1, -1])
    )
    assert (funnel.conditions[63].fails, funnel.conditions[62].remaining, funnel.kept) == (1, 2, 1)


def test_the_record_gives_back_the_same_funnel(funnel):
    assert Funnel.from_dict(funnel.as_dict()) == funnel


def test_counts_are_flat_numbers(funnel):
    assert funnel.counts["fails_alone.b"] == 1
    assert funnel.counts["duplicates.near"] == 1


def test_the_table_has_a_row_a_stage_and_escapes_bars(funnel):
    lines = funnel_markdown(funnel).splitlines()
    assert lines[0] == "**p** keeps 2 of 8 samples (25.0%)."
    assert lines[5] == "| b | `x \\| y > 2` | 3 | 1 | 4 |"
    assert lines[7] == "| duplicate: near | perceptual | 1 | 1 | 2 |"


def test_an_empty_pool_has_a_table_too():
    empty = count_funnel(
        "p", conditions=[("a", "x")], rules=[], failed=np.zeros(0, np.uint64), taken_by=np.zeros(0, np.int64)
    )
    assert "0 of 0" in funnel_markdown(empty)
