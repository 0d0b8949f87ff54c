"""Chat templates with marks render what the stock ones render; TRL's copies of those are the oracle."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import ProcessorMixin
from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

from tasks.training.template import (
    TEMPLATES,
    TemplateError,
    answer_marker,
    complete_template,
    marked_template,
)
from tests.tasks.training.tiny_models import LLAVA_STOCK, MODELS, stock_template


def said(role: str, *texts: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text} for text in texts]}


CHATS = {
    "one turn": [said("user", "What is this?", images=1), said("assistant", "A cat.")],
    "unanswered": [said("user", "What is this?", images=1)],
    "several turns": [
        said("user", "Compare.", images=2),
        said("assistant", "One is red."),
        said("user", "And now?", images=1),
        said("assistant", "All are."),
    ],
    "no image": [said("user", "Hello."), said("assistant", "Good day.")],
    "blanks": [said("user", "  What \n is this? ", images=1), said("assistant", " A cat.\n")],
    "text in parts": [said("user", "What", "is this?", images=1), said("assistant", "A cat.", "Grey.")],
    "other scripts": [said("user", "これは何ですか。", images=1), said("assistant", "Eine Katze – groß.")],
}
STOCK = {  # model of `MODELS`: the templates its makers have shipped
    "gemma4 dense": ("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"),
    "gemma3": ("gemma3",),
    "qwen2.5-vl": ("qwen2_5_vl",),
    "qwen3-vl": ("qwen3_vl",),
    "idefics3": ("smolvlm",),
}
SHIPPED = [(model, template) for model, templates in STOCK.items() for template in templates]


def processor_with(model: str, template: str) -> ProcessorMixin:
    processor = MODELS[model]()[0]
    processor.chat_template = template
    return processor


def render(processor: Any, chat: list[dict[str, Any]], template: str | None = None, **options: Any) -> str:
    return str(processor.apply_chat_template(chat, chat_template=template, tokenize=False, **options))


@pytest.mark.parametrize(("model", "stock"), SHIPPED)
def test_marked_templates_render_as_the_stock_ones(model: str, stock: str) -> None:
    processor = processor_with(model, stock_template(stock))
    marked = marked_template(processor)
    assert has_generation_markers(marked)
    for name, chat in CHATS.items():
        for prompting in (False, True):
            expected = render(processor, chat, add_generation_prompt=prompting)
            assert render(processor, chat, marked, add_generation_prompt=prompting) == expected, name


@pytest.mark.parametrize(("model", "stock"), SHIPPED)
def test_marked_templates_train_the_stop_token(model: str, stock: str) -> None:
    processor = processor_with(model, stock_template(stock))
    assert is_chat_template_stop_token_trained(processor, marked_template(processor))


@pytest.mark.parametrize("stock", STOCK["gemma4 dense"])
def test_system_turns_of_gemma_4_render_as_the_stock_ones(stock: str) -> None:
    processor = processor_with("gemma4 dense", stock_template(stock))
    chat = [{"role": "system", "content": " Be brief. "}, *CHATS["one turn"]]
    assert render(processor, chat, marked_template(processor)) == render(processor, chat)


def test_the_released_template_of_gemma_4_is_told_from_the_later_ones() -> None:
    released = marked_template(processor_with("gemma4 dense", stock_template("gemma4_v2")))
    assert released == (TEMPLATES / "gemma4_release.jinja").read_text()
    assert marked_template(processor_with("gemma4 dense", stock_template("gemma4_v5"))) != released


def test_the_released_template_refuses_what_it_would_render_differently() -> None:
    processor = processor_with("gemma4 dense", (TEMPLATES / "gemma4_release.jinja").read_text())
    for chat in ([said("system", "Be brief."), *CHATS["no image"]], [*CHATS["no image"], said("assistant", "Again.")]):
        with pytest.raises(jinja2.TemplateError):
            render(processor, chat)


def test_a_template_that_has_marks_is_kept() -> None:
    own = (TEMPLATES / "gemma4.jinja").read_text() + "{# mine #}"
    assert marked_template(processor_with("gemma4 dense", own)) == own


def test_a_template_that_nothing_with_marks_renders_alike_is_refused() -> None:
    changed = stock_template("gemma3").replace("<end_of_turn>\n", "<end_of_turn>\n\n")
    with pytest.raises(TemplateError, match=r"Gemma3Processor does not mark .* Put {% generation %} and"):
        marked_template(processor_with("gemma3", changed))


def test_llava_gets_the_tokens_that_its_own_template_leaves_out() -> None:
    processor = processor_with("llava clip llama", LLAVA_STOCK)
    processor.chat_template = complete_template(processor)
    # conversation "vicuna_v1" of the LLaVA 1.5 source: sep " ", sep2 "</s>"
    assert render(processor, CHATS["several turns"]) == (
        "<s>USER: <image>\n<image>\nCompare. ASSISTANT: One is red.</s> "
        "USER: <image>\nAnd now? ASSISTANT: All are.</s> "
    )
    prompt = render(processor, CHATS["unanswered"], add_generation_prompt=True)
    assert prompt == "<s>USER: <image>\nWhat is this? ASSISTANT:"


def test_llavas_text_is_otherwise_its_own() -> None:
    processor = processor_with("llava clip llama", LLAVA_STOCK)
    complete = complete_template(processor)
    chats = {**CHATS, "system": [said("system", "Be brief."), *CHATS["one turn"]]}
    for name, chat in chats.items():
        ours = render(processor, chat, complete).replace("<s>", "").replace("</s>", "")
        assert ours == render(processor, chat), name


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        ("{{ bos_token }}", "", "<bos>, which its tokenizer starts every text with"),
        ("<end_of_turn>\n", "\n", "what ends an answer"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused(old: str, new: str, missing: str) -> None:
    template = stock_template("gemma3")
    assert old in template
    with pytest.raises(TemplateError, match=f"Gemma3Processor leaves out {missing}"):
        complete_template(processor_with("gemma3", template.replace(old, new)))


def test_a_template_that_refuses_images_is_named_with_what_it_says() -> None:
    processor = processor_with("gemma3", "{{ raise_exception('Text only.') }}")
    with pytest.raises(
        TemplateError, match=r"Gemma3Processor refuses a question on an image with its answer: Text only"
    ):
        complete_template(processor)


def test_a_complete_template_is_kept() -> None:
    own = stock_template("gemma4_v5")
    assert complete_template(processor_with("gemma4 dense", own)) == own


@pytest.mark.parametrize(
    ("model", "marker"),
    [
        ("gemma4 dense", "<|turn>model\n"),
        ("gemma3", "<start_of_turn>model\n"),
        ("qwen2.5-vl", "<|im_start|>assistant\n"),
        ("idefics3", "Assistant:"),
        ("llava clip llama", "ASSISTANT:"),
    ],
)
def test_the_marker_of_a_turn_is_read_off_the_prompt(model: str, marker: str) -> None:
    assert answer_marker(MODELS[model]()[0]) == marker


def test_a_template_that_prompts_by_itself_has_its_marker_behind_the_question() -> None:
    assert answer_marker(processor_with("llava clip llama", stock_template("llava_next"))) == " [/INST]"


def test_templates_are_found_as_files() -> None:
    assert {path.name for path in Path(TEMPLATES).glob("*.jinja")} == {
        "gemma4.jinja",
        "gemma4_release.jinja",
        "llava.jinja",
    }


def test_what_the_assistant_says_begins_where_a_prompt_for_it_ends() -> None:
    """LLaVA's prompt ends with a colon, so the blank behind it is the answer's."""
    processor: Any = MODELS["llava clip llama"]()[0]
    template = (TEMPLATES / "llava.jinja").read_text()
    options = {"chat_template": template, "tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    batch = processor.tokenizer.apply_chat_template(CHATS["no image"], **options)
    before = [token for token, is_said in zip(batch["input_ids"], batch["assistant_masks"], strict=True) if not is_said]
    prompt = render(processor, CHATS["no image"][:1], template, add_generation_prompt=True)
    assert processor.tokenizer.decode(before).rstrip() == prompt
    assert processor.tokenizer.decode(before)[len(prompt) :] == " "  # what stands behind the answer's stop token
