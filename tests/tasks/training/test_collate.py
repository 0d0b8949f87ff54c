"""The loss mask, with TRL's own collator as the oracle of what a row becomes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.collate import IGNORED, CompletionCollator, LossMaskError, check_loss_mask
from tasks.training.dataset import read_examples, text_of, write_examples
from tasks.training.recipe import Recipe
from tasks.training.template import TemplateError, render_prompt, stop_ids


@pytest.fixture
def processor(gemma: Path, recipe: Recipe) -> ProcessorMixin:
    return models.load_processor(gemma, recipe)


@pytest.fixture(scope="module")
def rows(squares: tuple[Warehouse, SnapshotRef], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    warehouse, snapshot = squares
    path = tmp_path_factory.mktemp("rows") / "examples.arrow"
    return read_examples(
        write_examples(
            snapshot,
            recipe.model_copy(update={"completion": "caption"}),
            split="train",
            warehouse=warehouse,
            path=path,
        ).path
    )


def collator_of(processor: Any, **options: Any) -> CompletionCollator:
    stop = processor.tokenizer.convert_tokens_to_ids("<turn|>")
    return CompletionCollator(processor, **{"completion_only_loss": True, "stop_ids": (stop,)} | options)


def test_the_loss_covers_the_completion_and_the_stop_token(processor: Any, rows: Dataset) -> None:
    batch = collator_of(processor)([rows[i] for i in range(4)])
    for row, labels in zip(rows.select(range(4)), batch["labels"], strict=True):
        assert processor.tokenizer.decode(labels[labels != IGNORED]) == text_of(row["completion"]) + "<turn|>"


def test_rows_become_what_trl_makes_of_them_but_for_labels_after_the_stop_token(processor: Any, rows: Dataset) -> None:
    batch = [rows[i] for i in range(5)]
    ours = collator_of(processor)([dict(row) for row in batch])
    trl = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)([dict(row) for row in batch])
    assert set(ours) == set(trl)
    for name in set(ours) - {"labels"}:
        assert torch.equal(ours[name], trl[name]), name
    differs = ours["labels"] != trl["labels"]
    newline = processor.tokenizer.convert_tokens_to_ids("\n")
    assert differs.sum(dim=1).tolist() == [1] * 5
    assert set(trl["labels"][differs].tolist()) == {newline}


def test_the_image_comes_before_the_prompt(processor: Any, rows: Dataset) -> None:
    text = render_prompt(processor, rows[0])
    assert text.index("<|image|>") < text.index("What colour is it?")
    assert text.endswith("<|turn>model\n")


def test_a_sound_mask_passes(processor: Any, rows: Dataset) -> None:
    check_loss_mask(collator_of(processor), rows)


def test_a_loss_over_prompt_and_image_is_refused(processor: Any, rows: Dataset) -> None:
    class Everything(CompletionCollator):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            return {**batch, "labels": batch["input_ids"].clone()}

    careless = Everything(processor, completion_only_loss=True, stop_ids=collator_of(processor).stop_ids)
    with pytest.raises(LossMaskError, match="an image or pad token is in the loss"):
        check_loss_mask(careless, rows)


def test_a_loss_over_the_prompts_text_is_refused(processor: Any, rows: Dataset) -> None:
    class OneMore(CompletionCollator):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            first = int((batch["labels"][0] != IGNORED).nonzero()[0])
            batch["labels"][0, first - 2] = batch["input_ids"][0, first - 2]
            return batch

    careless = OneMore(processor, completion_only_loss=True, stop_ids=collator_of(processor).stop_ids)
    with pytest.raises(LossMaskError, match="the loss covers something else than the completion"):
        check_loss_mask(careless, rows)


def test_an_empty_mask_is_refused(processor: Any, rows: Dataset) -> None:
    class Nothing(CompletionCollator):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    with pytest.raises(LossMaskError, match="no token is in the loss"):
        check_loss_mask(Nothing(processor, completion_only_loss=True, stop_ids=(1,)), rows)


def test_a_template_that_never_ends_an_answer_is_refused(processor: Any, rows: Dataset) -> None:
    processor.chat_template = processor.chat_template.replace("text + '<turn|>'", "text")
    with pytest.raises(LossMaskError, match="does not end with a token that ends generation") as caught:
        check_loss_mask(collator_of(processor), rows)
    assert rows[0]["sample_id"] in str(caught.value)


def test_a_template_that_asks_otherwise_than_it_trains_is_refused(processor: Any, rows: Dataset) -> None:
    processor.chat_template = processor.chat_template.replace(
        "{%- if add_generation_prompt -%}\n    {{- '<|turn>model\\n' -}}",
        "{%- if add_generation_prompt -%}\n    {{- '<|turn>model\\n> ' -}}",
    )
    with pytest.raises(LossMaskError, match="differs from the prompt that answers are generated from"):
        check_loss_mask(collator_of(processor), rows)


def test_a_completion_that_the_template_rewrites_is_refused(processor: Any, rows: Dataset) -> None:
    processor.chat_template = processor.chat_template.replace("text + '<turn|>'", "text | upper + '<turn|>'")
    with pytest.raises(LossMaskError, match="the loss covers something else than the completion"):
        check_loss_mask(collator_of(processor), rows)


def test_stop_tokens_are_those_of_generation(gemma: Path, recipe: Recipe, processor: Any) -> None:
    model = models.load_model(gemma, models.place(recipe))
    assert processor.tokenizer.convert_tokens_to_ids("<turn|>") in stop_ids(model)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    with pytest.raises(TemplateError, match="names no eos_token_id"):
        stop_ids(model)
