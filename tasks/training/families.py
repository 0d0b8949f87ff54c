"""What differs between families of vision-language models: the names of their parts, chat templates, image tokens.

All are loaded through transformers' Auto classes; a model of no family here is trained in its language model only.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tasks.training.recipe import RecipeError

Part = Literal["language", "projector", "vision", "audio", "head", "other"]
"""A part of a model: decoder, what maps image features into it, vision tower, all of audio, output head."""

ImageTokens = Literal["soft", "pixels", "tiles", "fixed"]
"""What bounds an image's tokens: a setting of its own, its pixels, the tiles it is cut into, or nothing."""

SOFT_TOKENS = (70, 140, 280, 560, 1120)
"""Bounds that Gemma 4's image processor accepts."""


class ModelError(RuntimeError):
    """A model is not what the recipe asked for; the message says which part, and what to change."""


@dataclass(frozen=True)
class Family:
    """Where a family's models keep their parts, by dotted name, and what else is peculiar to it.

    A name inside another (the projector in Qwen's vision tower) counts as the inner part. Names that a model lacks,
    as Gemma 4 31B lacks audio, are skipped. `templates` are files in `templates/`, for chat templates without marks.
    """

    name: str
    model_types: tuple[str, ...]
    language: str = "model.language_model"
    vision: tuple[str, ...] = ("model.vision_tower",)
    projector: tuple[str, ...] = ("model.multi_modal_projector",)
    audio: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    image_tokens: ImageTokens = "fixed"

    def beside_language(self) -> Iterator[tuple[str, Part]]:
        """Give the names of its parts other than language model and head."""
        yield from ((name, "vision") for name in self.vision)
        yield from ((name, "projector") for name in self.projector)
        yield from ((name, "audio") for name in self.audio)


FAMILIES = (
    Family(
        "Gemma 4",
        ("gemma4",),
        projector=("model.embed_vision",),
        audio=("model.audio_tower", "model.embed_audio"),
        templates=("gemma4.jinja", "gemma4_release.jinja"),
        image_tokens="soft",
    ),
    Family(  # the 12B: patches go into the language model without a tower
        "Gemma 4 unified",
        ("gemma4_unified",),
        vision=(),
        projector=("model.embed_vision",),
        audio=("model.embed_audio",),
        templates=("gemma4.jinja", "gemma4_release.jinja"),
        image_tokens="soft",
    ),
    Family("Gemma 3", ("gemma3",)),
    Family("LLaVA", ("llava",), templates=("llava.jinja",)),
    Family(
        "Qwen2.5-VL",
        ("qwen2_vl", "qwen2_5_vl"),
        vision=("model.visual",),
        projector=("model.visual.merger",),
        image_tokens="pixels",
    ),
    Family(
        "Qwen3-VL",
        ("qwen3_vl",),
        vision=("model.visual",),
        projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
        image_tokens="pixels",
    ),
    Family(  # the first SmolVLM calls itself idefics3
        "SmolVLM",
        ("smolvlm", "idefics3"),
        language="model.text_model",
        vision=("model.vision_model",),
        projector=("model.connector",),
        image_tokens="tiles",
    ),
)


def find_family(model_type: str) -> Family | None:
    """Return the family of a configuration's `model_type`, or None."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)


@dataclass(frozen=True)
class Parts:
    """Which part of a model its modules and weights belong to, by dotted name; `roots` are the parts' own names."""

    roots: Mapping[str, Part]

    def of(self, name: str) -> Part:
        """Return the part of a module or weight; names inside a PEFT model count as those of its base model."""
        name = name.removeprefix("base_model.model.")
        inside = [root for root in self.roots if name == root or name.startswith(f"{root}.")]
        return self.roots[max(inside, key=len)] if inside else "other"

    def roots_of(self, part: Part) -> list[str]:
        """Return the names of the modules that make up `part`; none if the model lacks it."""
        return [root for root, its in self.roots.items() if its == part]


def parts_of(model: PreTrainedModel | PeftModel) -> Parts:
    """Return where `model` has its parts.

    A model of no known family has language, head and other. Raises `ModelError` if a known family's model does not
    look like one.
    """
    base = without_adapter(model)
    language = decoder_name(base)
    roots: dict[str, Part] = {language: "language"}
    family = find_family(base.config.model_type)
    if family:
        if family.language != language:
            raise ModelError(
                f"{type(base).__name__} keeps its language model in {language}, but {family.name} models had it in "
                f"{family.language}. Use a version of transformers that pyproject.toml allows, and report the model."
            )
        modules = {name for name, _ in base.named_modules()}
        roots |= {name: part for name, part in family.beside_language() if name in modules}
    roots |= {name: "head" for name, module in base.named_modules() if module is base.get_output_embeddings()}
    return Parts(roots)


def without_adapter(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model itself, which may be wrapped by PEFT."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def decoder_name(model: PreTrainedModel) -> str:
    """Return the dotted name of the language model's decoder inside `model`, such as `model.language_model`."""
    decoder = model.get_decoder()
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    if name in ("", model.base_model_prefix):
        raise ModelError(
            f"{type(model).__name__} does not say which part of it is the language model, so LoRA and 4-bit weights "
            "could end up in its vision tower. Use a model whose get_decoder() returns the text decoder alone."
        )
    return name


def whole_modules(model: PreTrainedModel, part: Part) -> list[str]:
    """Return the names of the largest modules that hold weights of `part` only; `RecipeError` if there are none.

    Lists of modules are not among them but their items, because PEFT can't copy a list.
    """
    parts = parts_of(model)

    def walk(name: str) -> list[str]:
        module = model.get_submodule(name)
        held = {parts.of(f"{name}.{weight}") for weight, _ in module.named_parameters()}
        if held == {part} and not isinstance(module, nn.ModuleList):
            return [name]
        if part not in held:
            return []
        return [found for child, _ in module.named_children() for found in walk(f"{name}.{child}")]

    found = [name for root in parts.roots_of(part) for name in walk(root)]
    if not found:
        raise RecipeError(f"full_parts: {missing_part(model, part)}")
    return found


def missing_part(model: PreTrainedModel, part: Part) -> str:
    """Say why `part` of the model can't be trained, and what can."""
    family = find_family(model.config.model_type)
    if family:
        return f"{type(model).__name__} has no {part} of its own. Leave {part} out."
    known = ", ".join(family.name for family in FAMILIES)
    return (
        f"which modules of {type(model).__name__} are its {part} is not known. Train the language model only, or a "
        f"model of a family that is known: {known}."
    )


def placeholder_ids(processor: Any) -> set[int]:
    """Return the ids of the tokens that stand for images, video and audio, and of those around them."""
    names = (
        *("image_token_id", "boi_token_id", "eoi_token_id", "video_token_id", "fake_image_token_id"),
        *("audio_token_id", "boa_token_id", "eoa_token_id", "vision_start_token_id", "vision_end_token_id"),
    )
    found = (getattr(owner, name, None) for owner in (processor, processor.tokenizer) for name in names)
    return {token for token in found if token is not None}


def limit_image_tokens(processor: Any, family: Family | None, tokens: int) -> None:
    """Make `processor` turn an image into at most `tokens` tokens; raises `RecipeError` if it has no such setting."""
    images = processor.image_processor
    kind = family.image_tokens if family else "soft" if hasattr(images, "max_soft_tokens") else "fixed"
    if kind == "soft":
        if tokens not in SOFT_TOKENS:
            raise RecipeError(f"max_image_tokens: is {tokens}. Write one of {', '.join(map(str, SOFT_TOKENS))}.")
        images.max_soft_tokens = tokens
        processor.image_seq_length = tokens
    elif kind == "pixels":
        most = tokens * (images.patch_size * images.merge_size) ** 2
        images.size = {"shortest_edge": min(images.size["shortest_edge"], most), "longest_edge": most}
    elif kind == "tiles":
        _limit_tiles(processor, tokens)
    else:
        raise RecipeError(
            f"max_image_tokens: {type(images).__name__} makes the same number of every image. Leave it empty."
        )


def _limit_tiles(processor: Any, tokens: int) -> None:
    """Bound the longest edge, so that the tiles and the small copy of the whole image stay within `tokens`."""
    images, each = processor.image_processor, processor.image_seq_len
    if tokens < each:
        raise RecipeError(f"max_image_tokens: is {tokens}, but one tile alone is {each} tokens. Write {each} or more.")
    edge = images.max_image_size["longest_edge"]
    tiles = int((tokens // each - 1) ** 0.5)  # along the longest edge; the image may be as high as wide
    images.do_image_splitting = tiles >= 1 and images.do_image_splitting
    images.size = {"longest_edge": edge * max(tiles, 1)}
