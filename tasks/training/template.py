"""What the chat template makes of a prompt, and where answers end: the same for training, evaluation and merging."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from tasks.training.dataset import text_of


class TemplateError(ValueError):
    """A model's files do not say how to talk to it; the message names what is missing."""


def render_prompt(processor: ProcessorMixin, row: Mapping[str, Any]) -> str:
    """Return the text the model is given to answer: the row's prompt after its image, ready for the answer."""
    content = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": text_of(row["prompt"])}]
    messages: Any = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


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
