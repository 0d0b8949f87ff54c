"""Counts are compared with what the collator makes of each row, images decoded and all."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin

from tasks.training import model as models
from tasks.training.collate import CompletionCollator
from tasks.training.conversations import ConversationCollator
from tasks.training.dataset import FEATURES
from tasks.training.documents import FEATURES as DOCUMENT_FEATURES
from tasks.training.lengths import LengthError, count_tokens, image_size, image_tokens
from tasks.training.recipe import Recipe

SIZES = [(64, 48), (48, 200), (400, 300), (31, 31), (300, 40)]
SENTENCE = "A cat sits on a mat and looks at the dog"


def picture(width: int, height: int, *, turned: bool = False) -> dict[str, Any]:
    data, image = io.BytesIO(), Image.new("RGB", (width, height), "red")
    exif = image.getexif()
    if turned:
        exif[0x0112] = 6
    image.save(data, "JPEG", exif=exif)
    return {"bytes": data.getvalue(), "path": None}


@pytest.fixture(scope="module")
def processor(gemma: Path) -> ProcessorMixin:
    return models.load_processor(gemma, Recipe(base_model=str(gemma), max_image_tokens=70))


@pytest.fixture(scope="module")
def rows() -> Dataset:
    """Prompts and answers of many lengths with no, one or two images; one picture lies on its side."""
    examples = []
    for at in range(12):
        said = " ".join(SENTENCE.split()[: 1 + at % 9])
        images = [picture(*SIZES[(at + n) % 5], turned=at == 3) for n in range(1 + at % 2)]
        message = [{"role": "user", "content": f"What is it? {said}"}]
        answer = [{"role": "assistant", "content": said}]
        examples.append({"sample_id": str(at), "prompt": message, "completion": answer, "images": images})
    return Dataset.from_list(examples, features=FEATURES)


def made(rows: Dataset, collator: Any) -> list[int]:
    return [collator([dict(row)])["input_ids"].shape[1] for row in rows]


def test_counts_are_what_the_collator_makes(rows: Dataset, processor: ProcessorMixin) -> None:
    collator = CompletionCollator(processor, completion_only_loss=True, stop_ids=(1,))
    found = count_tokens(rows, processor, collator)
    assert len(set(found.tolist())) > 5
    assert found.tolist() == made(rows, collator)


def test_workers_count_the_same(rows: Dataset, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch) -> None:
    collator = CompletionCollator(processor, completion_only_loss=True, stop_ids=(1,))
    monkeypatch.setattr("tasks.training.lengths.BATCH_ROWS", 5)
    assert count_tokens(rows, processor, collator, workers=1).tolist() == made(rows, collator)


def test_conversations_are_counted_too(processor: ProcessorMixin) -> None:
    examples = []
    for at in range(10):
        shown = [{"type": "image", "text": None}] * (1 + at % 2) + [{"type": "text", "text": "What is it?"}]
        said = [{"type": "text", "text": SENTENCE[: 4 + 3 * at]}]
        messages = [{"role": "user", "content": shown}, {"role": "assistant", "content": said}]
        images = [picture(*SIZES[(at + n) % 5]) for n in range(1 + at % 2)]
        examples.append({"sample_id": str(at), "messages": messages, "images": images})
    rows = Dataset.from_list(examples, features=DOCUMENT_FEATURES)
    collator = ConversationCollator(processor, stop_ids=(1,))
    assert count_tokens(rows, processor, collator).tolist() == made(rows, collator)


def test_no_image_is_decoded(rows: Dataset, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch) -> None:
    collator = CompletionCollator(processor, completion_only_loss=True, stop_ids=(1,))
    expected = made(rows, collator)
    monkeypatch.setattr("tasks.training.lengths.CHECKED_ROWS", 0)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", pytest.fail)
    found = count_tokens(rows, processor, collator)
    assert np.unique(found - expected).size == 2  # with no row to prove them on, an image's marks are not counted


def test_a_rule_that_counts_wrongly_is_noticed(
    rows: Dataset, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = CompletionCollator(processor, completion_only_loss=True, stop_ids=(1,))
    wrong = lambda self, image_sizes: {"num_image_tokens": [h // 10 for h, _ in image_sizes]}  # noqa: E731
    monkeypatch.setattr(type(processor), "_get_num_multimodal_tokens", wrong)
    with pytest.raises(LengthError, match=r"sample \d+: Gemma4Processor makes it [+-]\d+ tokens longer than counted"):
        count_tokens(rows, processor, collator)


def test_a_processor_without_a_rule_is_refused() -> None:
    with pytest.raises(LengthError, match="Leave tokens_per_batch empty"):
        image_tokens(object(), [(10, 10)])


def test_pictures_on_their_side_count_as_they_are_shown() -> None:
    assert image_size(picture(40, 30)["bytes"]) == (40, 30)
    assert image_size(picture(40, 30, turned=True)["bytes"]) == (30, 40)
