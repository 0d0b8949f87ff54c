"""The shipped tiny Gemma 4 loads, speaks Gemma 4's chat format, reads scenes, and does not do the demo's task yet."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
)
from trl.chat_template_utils import is_chat_template_stop_token_trained

from tasks.curation.scene import Scene, draw_scene, render
from tasks.sample_models import gemma_scenes, make_gemma

SHIPPED = Path(make_gemma.__file__).parent / "gemma"
QUESTION = "Which object is largest? Answer with its colour and shape."


@pytest.fixture(scope="module")
def processor() -> Gemma4Processor:
    return AutoProcessor.from_pretrained(SHIPPED, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Gemma4ForConditionalGeneration:
    return AutoModelForMultimodalLM.from_pretrained(SHIPPED, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Scene, Image.Image]]:
    """Scenes that the pretraining never saw."""
    drawn = []
    for index in range(48):
        rng = random.Random(f"gemma test {index}")
        scene = draw_scene(rng)
        drawn.append((scene, render(scene, size=(rng.randint(256, 512), rng.randint(256, 512)), seed=f"test {index}")))
    return drawn


Answers = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def answers(
    model: Gemma4ForConditionalGeneration, processor: Gemma4Processor, scenes: list[tuple[Scene, Image.Image]]
) -> Answers:
    """What the model says, greedily, to a question about each scene."""

    def ask(question: str) -> list[str]:
        chats = [[user(image(picture), text(question))] for _, picture in scenes]
        said = []
        for start in range(0, len(chats), 32):
            inputs = processor.apply_chat_template(
                chats[start : start + 32],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
            with torch.inference_mode():
                tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
            said += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return said

    return ask


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(picture: Image.Image | None = None) -> dict[str, Any]:
    return {"type": "image"} if picture is None else {"type": "image", "image": picture}


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(words: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(words)]}


CHATS = {
    "image then text": [user(image(), text(QUESTION)), assistant("red circle")],
    "text then image": [user(text(" Look: "), image()), assistant("red circle")],
    "two images": [user(image(), image(), text("Which differ?")), assistant(" none \n")],
    "several turns": [user(image(), text("What?")), assistant("A ring."), user(text("Sure?")), assistant("Yes.")],
    "plain strings": [{"role": "user", "content": " hi "}, {"role": "assistant", "content": " Hello. "}],
    "system string": [{"role": "system", "content": " Be brief. "}, user(text("hi")), assistant("Hello.")],
    "system parts": [{"role": "system", "content": [text("Be brief."), text("Be kind.")]}, user(text("hi"))],
    "audio and video": [user({"type": "audio"}, {"type": "video"}, text("hi")), assistant("Hello.")],
    "unanswered": [user(image(), text(QUESTION))],
}


def google_template() -> str:
    """The newest template that Google ships with Gemma 4, as TRL keeps it."""
    return (files("trl") / "chat_templates" / "gemma4_v5.jinja").read_text(encoding="utf-8")


def test_ships_in_less_than_five_megabytes() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 5_000_000


def test_loads_as_a_real_gemma_4(model: Gemma4ForConditionalGeneration, processor: Gemma4Processor) -> None:
    assert isinstance(model, Gemma4ForConditionalGeneration)
    assert isinstance(processor, Gemma4Processor)
    assert model.config.text_config.layer_types[-2:] == ["sliding_attention", "full_attention"]
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_token_ids_agree_between_model_and_tokenizer(
    model: Gemma4ForConditionalGeneration, processor: Gemma4Processor
) -> None:
    tokenizer, config = processor.tokenizer, model.config
    assert config.text_config.vocab_size == len(tokenizer)
    assert config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<|image|>")
    assert config.boi_token_id == tokenizer.convert_tokens_to_ids("<|image>")
    assert config.eoi_token_id == tokenizer.convert_tokens_to_ids("<image|>")
    assert config.text_config.pad_token_id == tokenizer.pad_token_id
    assert config.text_config.bos_token_id == tokenizer.bos_token_id
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<eos>", "<turn|>"])


def test_tokenizer_gives_back_any_text(processor: Gemma4Processor) -> None:
    words = 'Zwölf  rote Kreise — "赤い丸"?\n\t42 % 🟥'
    assert processor.tokenizer.decode(processor.tokenizer(words)["input_ids"]) == words


def test_shipped_chat_template_is_the_one_used_for_training(processor: Gemma4Processor) -> None:
    assert processor.chat_template == make_gemma.CHAT_TEMPLATE.read_text(encoding="utf-8")


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", CHATS)
def test_chats_render_as_googles_template_renders_them(
    processor: Gemma4Processor, name: str, add_generation_prompt: bool
) -> None:
    ours = processor.apply_chat_template(CHATS[name], add_generation_prompt=add_generation_prompt)
    stock = processor.apply_chat_template(
        CHATS[name], add_generation_prompt=add_generation_prompt, chat_template=google_template()
    )
    assert ours == stock


@pytest.mark.parametrize(
    "chat",
    [
        [user(text("hi")), {**assistant("Hello."), "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
        [user(text("hi")), {**assistant("Hello."), "reasoning": "A greeting."}],
        [user(text("hi")), assistant("<|channel>thought\nA greeting.<channel|>Hello.")],
        [user(text("hi")), assistant("Hello."), assistant("Again.")],
        [user(text("hi")), {"role": "tool", "content": "4"}],
        [user({"type": "smell"})],
    ],
    ids=["tool call", "reasoning", "thought in the text", "two answers", "tool answer", "unknown part"],
)
def test_chats_that_would_render_differently_are_refused(processor: Gemma4Processor, chat: list[Any]) -> None:
    with pytest.raises(jinja2.TemplateError):
        processor.apply_chat_template(chat)


def test_loss_mask_covers_the_answers_and_their_stop_tokens_only(processor: Gemma4Processor) -> None:
    picture = Image.new("RGB", (320, 240))
    chat = [user(image(picture), text("What?")), assistant("A ring."), user(image(picture)), assistant("No.")]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    masked = inputs["input_ids"][0][torch.as_tensor(inputs["assistant_masks"][0]).bool()]
    assert processor.decode(masked) == "A ring.<turn|>No.<turn|>"


def test_trl_finds_the_stop_token_trained(processor: Gemma4Processor) -> None:
    assert is_chat_template_stop_token_trained(processor)


@pytest.mark.parametrize("size", [(200, 200), (640, 480), (900, 300), (48, 64)])
def test_an_image_takes_at_most_seventy_tokens(processor: Gemma4Processor, size: tuple[int, int]) -> None:
    inputs = processor.apply_chat_template(
        [user(image(Image.new("RGB", size)))], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert 48 <= int((inputs["input_ids"] == processor.image_token_id).sum()) <= 70


def test_pretraining_batch_is_what_the_processor_makes(
    model: Gemma4ForConditionalGeneration,
    processor: Gemma4Processor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a process of its own would only cost time
    monkeypatch.setattr(gemma_scenes, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers))
    cache = gemma_scenes.SceneCache.render(tmp_path, processor_path=SHIPPED, scenes=3, seed="test", workers=1)
    batch = gemma_scenes.make_batch(cache, torch.arange(3), model.config)
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][real]
        rendered = processor.decode(ids)
        question = rendered.partition("<image|>")[2].partition("<turn|>")[0]
        answer = processor.decode(batch["labels"][row][batch["labels"][row] != -100]).removesuffix("<turn|>")
        _, picture, _ = gemma_scenes.draw_example(f"test {row}")
        expected = processor.apply_chat_template(
            [user(image(picture), text(question)), assistant(answer)],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert ids.tolist() == expected["input_ids"][0, :-1].tolist()  # without the newline after <turn|>
        assert batch["mm_token_type_ids"][row][real].tolist() == expected["mm_token_type_ids"][0, :-1].tolist()
        assert torch.equal(batch["image_position_ids"][row], expected["image_position_ids"][0])
        torch.testing.assert_close(batch["pixel_values"][row], expected["pixel_values"][0])


def test_captions_name_the_largest_objects(answers: Answers, scenes: list[tuple[Scene, Image.Image]]) -> None:
    captions = answers("Describe this image.")
    named = sum(scene.answer in caption for (scene, _), caption in zip(scenes, captions, strict=True))
    assert named / len(scenes) >= 0.9


def test_does_not_answer_the_demos_question_yet(answers: Answers, scenes: list[tuple[Scene, Image.Image]]) -> None:
    said = answers(QUESTION)
    exact = sum(scene.answer == answer.strip().lower() for (scene, _), answer in zip(scenes, said, strict=True))
    assert exact / len(scenes) <= 0.4
