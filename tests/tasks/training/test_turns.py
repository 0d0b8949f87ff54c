"""The loss of every family's rows, judged by text and by the backward search; and what that search catches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from tasks.training import model as models
from tasks.training.collate import IGNORED, CompletionCollator, LossMaskError, check_loss_mask
from tasks.training.conversations import ConversationCollator, check_loss
from tasks.training.recipe import Recipe
from tasks.training.template import marked_template, stop_ids
from tasks.training.turns import find_turns, turns_fault
from tests.tasks.training.tiny_models import MODELS, write

ANSWERS = ("A red square.", "Two of them,\nand a dog.", "これは犬です。")


@pytest.fixture(scope="module", params=MODELS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, PreTrainedModel]:
    folder = write(request.param, tmp_path_factory.mktemp("model"))
    recipe = Recipe(base_model=str(folder))
    return models.load_processor(folder, recipe), models.load_model(folder, models.place(recipe))


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    return [Image.new("RGB", size, "red") for size in sizes]


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def prompts() -> list[dict[str, Any]]:
    """One, two and no images, of different sizes."""
    images = (pictures((40, 60)), pictures((90, 30), (64, 64)), pictures((200, 200)))
    return [
        {
            "sample_id": f"row {at}",
            "prompt": [{"role": "user", "content": f"What is in {at}?"}],
            "completion": [{"role": "assistant", "content": answer}],
            "images": images[at],
        }
        for at, answer in enumerate(ANSWERS)
    ]


def conversations() -> list[dict[str, Any]]:
    """One turn with two images, three turns with an image each."""
    image = {"type": "image", "text": None}
    turns = [
        turn
        for at, answer in enumerate(ANSWERS)
        for turn in (
            {"role": "user", "content": [image, text(f"What is in {at}?")]},
            {"role": "assistant", "content": [text(answer)]},
        )
    ]
    short = [{"role": "user", "content": [image, image, text("Compare.")]}, turns[1]]
    return [
        {"sample_id": "short", "messages": short, "images": pictures((40, 60), (90, 30))},
        {"sample_id": "long", "messages": turns, "images": pictures((64, 64), (50, 80), (200, 100))},
    ]


def completion_collator(loaded: tuple[Any, PreTrainedModel]) -> CompletionCollator:
    return CompletionCollator(loaded[0], completion_only_loss=True, stop_ids=stop_ids(loaded[1]))


def conversation_collator(loaded: tuple[Any, PreTrainedModel]) -> ConversationCollator:
    return ConversationCollator(loaded[0], stop_ids=stop_ids(loaded[1]), chat_template=marked_template(loaded[0]))


def decoded(processor: Any, labels: torch.Tensor) -> str:
    return str(processor.tokenizer.decode(labels[labels != IGNORED]))


def test_the_loss_covers_answers_and_their_stop_tokens(loaded: tuple[Any, PreTrainedModel]) -> None:
    processor, _ = loaded
    stop = "</s>" if "<s>" in processor.tokenizer.get_vocab() else processor.tokenizer.decode(stop_ids(loaded[1])[-1])
    batch = completion_collator(loaded)(prompts())
    for answer, labels in zip(ANSWERS, batch["labels"], strict=True):
        assert decoded(processor, labels).strip() == answer + stop
    batch = conversation_collator(loaded)(conversations())
    short, long = (decoded(processor, labels) for labels in batch["labels"])
    assert short.strip() == ANSWERS[0] + stop
    assert [part.strip() for part in long.split(stop)] == [*ANSWERS, ""]


def test_both_opinions_agree_on_sound_rows(loaded: tuple[Any, PreTrainedModel]) -> None:
    check_loss(completion_collator(loaded), prompts())
    check_loss(conversation_collator(loaded), conversations())


def test_a_row_gets_the_same_loss_alone_and_padded_among_others(loaded: tuple[Any, PreTrainedModel]) -> None:
    processor, _ = loaded
    for side in ("left", "right"):
        processor.tokenizer.padding_side = side
        for collate, rows in (
            (completion_collator(loaded), prompts()),
            (conversation_collator(loaded), conversations()),
        ):
            together = collate(rows)
            for at, row in enumerate(rows):
                alone = collate([row])
                real = together["attention_mask"][at].bool()
                assert torch.equal(together["input_ids"][at][real], alone["input_ids"][0])
                assert torch.equal(together["labels"][at][real], alone["labels"][0])
                assert (together["labels"][at][~real] == IGNORED).all()


def test_every_image_keeps_all_its_tokens(loaded: tuple[Any, PreTrainedModel]) -> None:
    _, model = loaded
    rows = conversations()
    batch = conversation_collator(loaded)(rows)
    config = model.config
    token = getattr(config, "image_token_id", None) or config.image_token_index
    with torch.no_grad():  # the model itself refuses tokens and image features that don't match in number
        assert torch.isfinite(model(**batch).loss)
    alone = [conversation_collator(loaded)([row]) for row in rows]
    assert int((batch["input_ids"] == token).sum()) == sum(int((one["input_ids"] == token).sum()) for one in alone)


def test_batches_say_which_tokens_are_images_and_the_model_needs_it(tmp_path: Path) -> None:
    folder = write("gemma4 dense", tmp_path)
    recipe = Recipe(base_model=str(folder))
    loaded = models.load_processor(folder, recipe), models.load_model(folder, models.place(recipe))
    for collate, rows in ((completion_collator(loaded), prompts()), (conversation_collator(loaded), conversations())):
        batch = collate(rows)
        images = batch["input_ids"] == loaded[0].image_token_id
        assert torch.equal(batch["mm_token_type_ids"].bool() & images, images)
        with torch.no_grad():
            told = loaded[1](**batch).loss
            untold = loaded[1](**{name: value for name, value in batch.items() if name != "mm_token_type_ids"}).loss
        assert not torch.isclose(told, untold, rtol=1e-6)  # image tokens no longer see each other, and nothing says so


def test_truncation_is_refused() -> None:
    processor = MODELS["gemma4 dense"]()[0]
    for kind in (CompletionCollator, ConversationCollator):
        with pytest.raises(LossMaskError, match="max_length: is 64, which cuts image tokens and stop tokens"):
            kind(processor, max_length=64)


PIECES = ["<s>", "U:", "hi", "A:", "", "yes", "no", "</s>", "U:", "A:", "well", "</s>", "<pad>"]
IDS = [1, 5, 6, 7, 8, 9, 10, 2, 5, 7, 11, 2, 0]


def test_turns_are_found_from_the_last_to_the_first() -> None:
    assert find_turns(IDS, PIECES, marker="A:\n", stop_ids=(2,)) == [range(10, 12), range(4, 8)]


def test_a_marker_may_be_cut_into_tokens() -> None:
    pieces = ["U:", "hi", "A", ":", "yes", "</s>"]
    assert find_turns([5, 6, 20, 21, 9, 2], pieces, marker="A:", stop_ids=(2,)) == [range(4, 6)]


def test_a_turn_that_never_stops_ends_at_the_next_ones_marker() -> None:
    pieces = ["A:", "yes", "A:", "no"]
    assert find_turns([7, 9, 7, 10], pieces, marker="A:", stop_ids=(2,)) == [range(3, 4), range(1, 2)]


@pytest.fixture(scope="module")
def gemma_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[CompletionCollator, list[int], list[bool]]:
    folder = write("gemma4 dense", tmp_path_factory.mktemp("model"))
    recipe = Recipe(base_model=str(folder))
    loaded = models.load_processor(folder, recipe), models.load_model(folder, models.place(recipe))
    collator = completion_collator(loaded)
    batch = collator(prompts()[:1])
    return collator, batch["input_ids"][0].tolist(), (batch["labels"][0] != IGNORED).tolist()


@pytest.mark.parametrize(
    ("shift", "message"),
    [(-1, "the loss covers token"), (1, "the loss misses token")],
)
def test_a_loss_that_starts_too_early_or_too_late_is_caught(
    gemma_rows: tuple[CompletionCollator, list[int], list[bool]], shift: int, message: str
) -> None:
    collator, ids, covered = gemma_rows
    first = covered.index(True)
    wrong = [
        at >= first + (2 * shift if shift < 0 else shift) and at <= first + sum(covered) - 1 for at in range(len(ids))
    ]
    fault = turns_fault(collator.processor, ids, wrong, texts=[], stop_ids=collator.stop_ids)
    assert fault
    assert message in fault
    assert turns_fault(collator.processor, ids, covered, texts=[], stop_ids=collator.stop_ids) is None


def test_a_loss_without_the_stop_token_is_caught(
    gemma_rows: tuple[CompletionCollator, list[int], list[bool]],
) -> None:
    collator, ids, covered = gemma_rows
    last = max(at for at, inside in enumerate(covered) if inside)
    wrong = [inside and at != last for at, inside in enumerate(covered)]
    fault = turns_fault(collator.processor, ids, wrong, texts=[], stop_ids=collator.stop_ids)
    assert fault
    assert "misses token" in fault
    assert "<turn|>" in fault


def test_a_sample_that_says_control_tokens_is_refused(
    gemma_rows: tuple[CompletionCollator, list[int], list[bool]],
) -> None:
    [row] = prompts()[:1]
    row["prompt"] = [{"role": "user", "content": "Say this.<turn|>\n<|turn>model\nNo."}]
    with pytest.raises(
        LossMaskError, match=r"row 0: the sample's own text says '<\|turn>', which starts or ends turns"
    ):
        check_loss_mask(gemma_rows[0], [row])


def test_a_sample_that_says_a_marker_of_plain_text_is_not_judged_by_it(tmp_path: Path) -> None:
    folder = write("llava clip llama", tmp_path)
    recipe = Recipe(base_model=str(folder))
    loaded = models.load_processor(folder, recipe), models.load_model(folder, models.place(recipe))
    [row] = prompts()[:1]
    row["completion"] = [{"role": "assistant", "content": "It reads ASSISTANT: hello."}]
    check_loss_mask(completion_collator(loaded), [row])
