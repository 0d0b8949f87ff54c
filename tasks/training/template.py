"""What the chat template makes of a prompt, and where answers end: the same for training, evaluation and merging."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedModel, ProcessorMixin
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from tasks.training.dataset import text_of
from tasks.training.families import FAMILIES

TEMPLATES = Path(__file__).parent / "templates"


class TemplateError(ValueError):
    """A model's files do not say how to talk to it; the message names what is missing."""


def render_prompt(processor: ProcessorMixin, row: Mapping[str, Any]) -> str:
    """Return the text the model is given to answer: the row's prompt after its image, ready for the answer."""
    content = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": text_of(row["prompt"])}]
    return _render(processor, [{"role": "user", "content": content}], add_generation_prompt=True)


def answer_marker(processor: ProcessorMixin) -> str:
    """Return the text after which the model answers, such as `<|turn>model` and a line's end."""
    question = _turn("user", "What is this?")
    asked = _render(processor, [question])
    return _render(processor, [question], add_generation_prompt=True).removeprefix(asked) or _behind(asked)


def complete_template(processor: ProcessorMixin) -> str:
    """Return the processor's own chat template, or one of ours that writes the same but leaves nothing out.

    LLaVA's own leaves out what ends an answer, which a model must learn to say, and what starts every text. Raises
    `TemplateError` if something is left out and none of ours fits, or if its own refuses images.
    """
    own = _default(processor)
    try:
        lacks = _left_out(processor, own)
    except jinja2.TemplateError as error:
        raise TemplateError(
            f"the chat template of {type(processor).__name__} refuses a question on an image with its answer: {error}. "
            "Use the instruction-tuned variant of the model, or correct its chat_template.jinja."
        ) from None
    if not lacks:
        return own
    for template in _ours():
        if not _left_out(processor, template) and _renders_alike(processor, own, template, but_for=_ends(processor)):
            return template
    raise TemplateError(
        f"the chat template of {type(processor).__name__} leaves out {lacks}. Write it into the model folder's "
        "chat_template.jinja."
    )


def marked_template(processor: ProcessorMixin) -> str:
    """Return a chat template that renders as the processor's own does and marks what the assistant says for the loss.

    That is its own if it has marks, else TRL's training template or one of ours. Raises `TemplateError` if none renders
    alike.
    """
    own = _default(processor)
    if has_generation_markers(own):
        return own
    for template in (*_from_trl(processor), *_ours()):
        if _renders_alike(processor, own, template):
            return template
    raise TemplateError(
        f"the chat template of {type(processor).__name__} does not mark what the assistant says, and no template that "
        "does renders the same text. Put {% generation %} and {% endgeneration %} around the assistant's text and the "
        "token that ends its turn, in the model folder's chat_template.jinja."
    )


def stop_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the ids of the tokens at which the model's generation ends. Raises `TemplateError` if it names none."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found = [configured] if isinstance(configured, int) else list(configured or [])
    if not found:
        raise TemplateError(
            "the model's generation_config names no eos_token_id, so answers would never end. Add the token that ends "
            "a turn to its generation_config.json."
        )
    return tuple(found)


def _turn(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


_ANSWER = "An answer."
_CHATS: tuple[list[dict[str, Any]], ...] = (
    [_turn("user", "What is this?", images=1)],
    [_turn("user", "What is this?", images=1), _turn("assistant", _ANSWER)],
    [
        _turn("user", " Two \n images ", images=2),
        _turn("assistant", _ANSWER),
        _turn("user", "And this?", images=1),
        _turn("assistant", "Another."),
    ],
)


def _render(processor: Any, chat: list[dict[str, Any]], template: str | None = None, **options: Any) -> str:
    text = processor.apply_chat_template(chat, chat_template=template, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def _renders_alike(processor: Any, own: str, other: str, *, but_for: tuple[str, ...] = ()) -> bool:
    """Whether two templates give the same text of prompts and of conversations, once `but_for` is cut out of both."""

    def texts(template: str) -> Iterator[str]:
        for chat in _CHATS:
            for prompting in (True, False):
                text = _render(processor, chat, template, add_generation_prompt=prompting)
                for token in but_for:
                    text = text.replace(token, "")
                yield text

    try:
        return list(texts(own)) == list(texts(other))
    except jinja2.TemplateError:  # one of them refuses such chats
        return False


def _left_out(processor: Any, template: str) -> str | None:
    text = _render(processor, _CHATS[1], template)
    tokenizer = processor.tokenizer
    starts = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if starts and not text.startswith(tokenizer.bos_token):
        return f"{tokenizer.bos_token}, which its tokenizer starts every text with"
    if not text.rpartition(_ANSWER)[2].strip():
        return "what ends an answer"
    return None


def _behind(asked: str) -> str:
    """What stands behind the question, for templates that prompt without being told to."""
    return asked.rpartition("What is this?")[2]


def _ends(processor: Any) -> tuple[str, ...]:
    tokenizer = processor.tokenizer
    return tuple(token for token in (tokenizer.bos_token, tokenizer.eos_token) if token)


def _default(processor: Any) -> str:
    """The template in use, of processors that have several."""
    own = processor.chat_template
    return str(own["default"] if isinstance(own, dict) else own)


def _from_trl(processor: Any) -> list[str]:
    try:
        template = get_training_chat_template(processor)
    except ValueError:  # it knows no such template
        return []
    return [template] if template else []


def _ours() -> Iterator[str]:
    for name in sorted({name for family in FAMILIES for name in family.templates}):
        yield (TEMPLATES / name).read_text(encoding="utf-8")
