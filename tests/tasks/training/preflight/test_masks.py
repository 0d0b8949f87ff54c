"""Whole-sequence labels, a stop token without loss, a prompt asked otherwise: all leave the loss looking fine."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset

from tasks.training.collate import IGNORED, CompletionCollator
from tasks.training.conversations import make_collator
from tasks.training.dataset import text_of
from tasks.training.documents import FEATURES
from tasks.training.preflight.child import CHECKS, run_checks
from tasks.training.preflight.masks import check_mask, check_prompt, spans
from tasks.training.preflight.setup import Setup


def spoiled(setup: Setup, spoil: Callable[[dict[str, Any]], torch.Tensor]) -> Setup:
    """The set-up with other labels: what `spoil` makes of a batch."""

    class Spoiled(CompletionCollator):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            return {**batch, "labels": spoil(batch)}

    collator = Spoiled(setup.processor, completion_only_loss=True, stop_ids=setup.collator.stop_ids)
    return replace(setup, collator=collator)


def test_sound_labels_pass(shared_setup: Setup) -> None:
    [finding] = check_mask(shared_setup)
    assert finding.status == "ok"
    assert finding.subject == "8 samples"


def test_labels_over_the_whole_sequence_fail_for_every_sample(shared_setup: Setup) -> None:
    found = check_mask(spoiled(shared_setup, lambda batch: batch["input_ids"].clone()))
    assert [finding.status for finding in found] == ["failed"] * 8
    assert "an image or pad token is in the loss" in found[0].measured
    assert found[0].remedy


def test_a_stop_token_without_loss_fails(shared_setup: Setup) -> None:
    def without_stop(batch: dict[str, Any]) -> torch.Tensor:
        stops = torch.isin(batch["labels"], torch.tensor(shared_setup.collator.stop_ids))
        return batch["labels"].masked_fill(stops, IGNORED)

    found = check_mask(spoiled(shared_setup, without_stop))
    assert "does not end with a token that ends generation" in found[0].measured


def test_no_label_at_all_fails(shared_setup: Setup) -> None:
    found = check_mask(spoiled(shared_setup, lambda batch: torch.full_like(batch["labels"], IGNORED)))
    assert "no token is in the loss" in found[0].measured


def test_labels_that_change_beside_other_samples_fail(shared_setup: Setup) -> None:
    def padding_too(batch: dict[str, Any]) -> torch.Tensor:
        return torch.where(batch["attention_mask"] == 0, batch["input_ids"], batch["labels"])

    [finding] = check_mask(spoiled(shared_setup, padding_too))
    assert finding.status == "failed"
    assert "other tokens are in the loss beside other samples" in finding.measured


def test_an_equal_prompt_passes(shared_setup: Setup) -> None:
    [finding] = check_prompt(shared_setup)
    assert finding.status == "ok"


def test_a_prompt_that_is_asked_otherwise_fails_and_shows_both(
    own_processor: Any, with_processor: Callable[[Any], Setup]
) -> None:
    own_processor.chat_template = own_processor.chat_template.replace(
        "{%- if add_generation_prompt -%}\n    {{- '<|turn>model\\n' -}}",
        "{%- if add_generation_prompt -%}\n    {{- '<|turn>model\\n> ' -}}",
    )
    [finding] = check_prompt(with_processor(own_processor))
    assert finding.status == "failed"
    trained, asked = finding.measured.split(", asked with ")
    assert ">" in asked
    assert "> " not in trained


def test_spans_show_where_the_loss_begins_and_ends(shared_setup: Setup) -> None:
    rows = shared_setup.rows()[:2]
    shown = spans(shared_setup, rows)
    for row in rows:
        own = [span for span in shown if span.sample_id == row["sample_id"]]
        assert [span.text for span in own if span.supervised] == [text_of(row["completion"]) + "<turn|>"]
        tokens = int((shared_setup.collator([dict(row)])["input_ids"] == 5).sum())
        assert f"[{tokens} image tokens]" in own[0].text
        assert "What colour is it?" in own[0].text


@pytest.fixture(scope="module")
def documents(rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Conversations of two turns about two images."""
    images = [rows[at]["images"][0] for at in range(4)]

    def turn(answer: str) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": [{"type": "image", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]

    conversations = [
        {"sample_id": str(at), "messages": turn("A square.") + turn("Another one."), "images": images[at : at + 2]}
        for at in range(3)
    ]
    return Dataset.from_list(conversations, features=FEATURES)


def test_conversations_are_checked_turn_by_turn(shared_setup: Setup, documents: Dataset) -> None:
    collator = make_collator(shared_setup.processor, documents, shared_setup.collator.stop_ids)
    setup = replace(shared_setup, examples=documents, collator=collator)
    assert [f.status for f in (*check_mask(setup), *check_prompt(setup))] == ["ok", "ok"]
    shown = [span.text for span in spans(setup, [documents[0]]) if span.supervised]
    assert shown == ["A square.<turn|>", "Another one.<turn|>"]


def test_every_check_takes_conversations(shared_setup: Setup, documents: Dataset) -> None:
    collator = make_collator(shared_setup.processor, documents, shared_setup.collator.stop_ids)
    found = run_checks(replace(shared_setup, examples=documents, collator=collator), CHECKS)
    assert {finding.status for finding in found} == {"ok"}
