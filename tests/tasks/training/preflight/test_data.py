"""Rows that are too long, whose images can't be read, or that all have the same answer."""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image

from tasks.training.dataset import FEATURES
from tasks.training.preflight.data import check_data
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.setup import Setup

Make = Callable[[list[dict[str, Any]]], Setup]


def picture(colour: str = "red", size: tuple[int, int] = (60, 40)) -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def row(name: str, answer: str, image: Any = None, prompt: str = "What is it?") -> dict[str, Any]:
    return {
        "sample_id": name,
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": answer}],
        "images": [image or picture()],
    }


@pytest.fixture
def setup_of(shared_setup: Setup) -> Make:
    """The sound set-up with other rows."""
    return lambda rows: replace(shared_setup, examples=Dataset.from_list(rows, features=FEATURES))


def found(setup: Setup) -> dict[str, Finding]:
    return {finding.check: finding for finding in check_data(setup)}


def test_sound_rows_pass(shared_setup: Setup) -> None:
    assert {name: finding.status for name, finding in found(shared_setup).items()} == {
        "length": "ok",
        "readable images": "ok",
        "answers": "ok",
    }


def test_a_row_longer_than_the_models_context_fails_by_name(setup_of: Make) -> None:
    long = "red " * 3000
    finding = found(setup_of([row("short", "red"), row("endless", long)]))["length"]
    assert finding.status == "failed"
    assert "1 are longer, such as endless (" in finding.measured
    assert "2048 tokens, the model's context" in finding.wanted


def test_many_bytes_that_are_few_tokens_are_not_too_long(setup_of: Make, shared_setup: Setup) -> None:
    word = "square "  # one or two tokens of seven bytes
    text = word * 400
    assert len(text.encode()) > 2048
    tokens = shared_setup.processor.tokenizer(text)["input_ids"]  # type: ignore[attr-defined]
    assert len(tokens) < 1500
    assert found(setup_of([row("wordy", text), row("short", "red")]))["length"].status == "ok"


def test_a_missing_image_fails(setup_of: Make) -> None:
    empty = {"bytes": None, "path": None}
    finding = found(setup_of([row("whole", "red"), {**row("lost", "blue"), "images": [empty]}]))["readable images"]
    assert (finding.status, finding.measured) == ("failed", "missing or unreadable in 1: lost")


@pytest.mark.parametrize("damage", [lambda data: b"no image", lambda data: data[:60]])
def test_an_image_that_can_not_be_read_fails(setup_of: Make, damage: Callable[[bytes], bytes]) -> None:
    broken = {"bytes": damage(picture(size=(400, 400))["bytes"]), "path": None}
    finding = found(setup_of([row("whole", "red"), row("broken", "blue", broken)]))["readable images"]
    assert (finding.status, finding.measured) == ("failed", "missing or unreadable in 1: broken")


def test_the_same_answer_for_everything_fails(setup_of: Make) -> None:
    finding = found(setup_of([row(str(at), "a photo") for at in range(5)]))["answers"]
    assert finding.status == "failed"
    assert "1 different; most common: 'a photo' 100%" in finding.measured


def test_nearly_always_the_same_answer_is_noted(setup_of: Make) -> None:
    finding = found(setup_of([row(str(at), "no" if at else "yes") for at in range(20)]))["answers"]
    assert finding.status == "noted"
    assert "'no' 95%, 'yes' 5%" in finding.measured


def test_a_single_row_is_no_constant(setup_of: Make) -> None:
    assert found(setup_of([row("only", "red")]))["answers"].status == "noted"


def test_a_sample_longer_than_a_batch_fails_before_a_model_is_trained(shared_setup: Setup) -> None:
    def batches(tokens: int) -> Finding:
        return found(replace(shared_setup, recipe=shared_setup.recipe.model_copy(update={"tokens_per_batch": tokens})))[
            "batches"
        ]

    assert batches(4096).status == "ok"
    assert batches(64).status == "failed"
    assert "Write at least that many" in batches(64).measured


def test_rows_that_can_not_be_counted_make_no_batches_of_tokens(
    shared_setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(shared_setup.processor), "_get_num_multimodal_tokens", None)
    by_tokens = shared_setup.recipe.model_copy(update={"tokens_per_batch": 4096})
    findings = found(replace(shared_setup, recipe=by_tokens))
    assert (findings["length"].status, findings["batches"].status) == ("noted", "failed")
    assert "Leave tokens_per_batch empty" in findings["batches"].measured
