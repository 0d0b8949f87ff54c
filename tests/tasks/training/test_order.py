from itertools import islice

import pytest

from tasks.training.order import Order


def test_every_pass_shows_every_row_once() -> None:
    rows = list(Order(13, steps=13, per_step=4, seed=0))
    passes = [rows[at : at + 13] for at in range(0, 52, 13)]
    assert all(sorted(one) == list(range(13)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4


@pytest.mark.parametrize(("steps", "per_step"), [(1, 4), (8, 4), (3, 40)])
def test_no_step_is_short(steps: int, per_step: int) -> None:
    order = Order(13, steps=steps, per_step=per_step, seed=0)
    assert len(list(order)) == len(order) == steps * per_step


def test_it_does_not_depend_on_how_the_steps_are_cut() -> None:
    assert list(Order(13, steps=8, per_step=4, seed=0)) == list(Order(13, steps=4, per_step=8, seed=0))


def test_a_longer_training_begins_as_a_shorter_one() -> None:
    assert list(islice(Order(13, steps=9, per_step=4, seed=0), 32)) == list(Order(13, steps=8, per_step=4, seed=0))


def test_another_seed_is_another_order() -> None:
    assert list(Order(13, steps=3, per_step=4, seed=0)) != list(Order(13, steps=3, per_step=4, seed=99))
