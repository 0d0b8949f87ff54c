"""A training that diverged is not repeated in vain."""

from pathlib import Path

import pytest

from tasks.training import divergence
from tasks.training.divergence import Diverged, recall, remember

ERROR = Diverged("the loss is not finite", step=3, sample_ids=["a", "b"])


def test_the_message_names_step_samples_and_remedy() -> None:
    assert str(ERROR).startswith("the loss is not finite in step 3, with samples a, b. ")
    assert "learning_rate" in str(ERROR)


def test_it_is_recalled_as_long_as_nothing_changed(tmp_path: Path) -> None:
    assert recall(tmp_path) is None
    remember(ERROR, tmp_path)
    assert recall(tmp_path) == str(ERROR)
    assert recall(tmp_path) == str(ERROR)


def test_other_versions_are_worth_a_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(ERROR, tmp_path)
    monkeypatch.setattr(divergence, "versions", lambda: {"torch": "99"})
    assert recall(tmp_path) is None
