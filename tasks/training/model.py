"""Loads a base model, its processor and adapters the way a recipe says, and checks that they came out that way.

What is 4-bit and what gets LoRA is derived from the model's own modules: names differ between architectures, and a
pattern that matches nothing, or the vision tower, leaves the loss looking fine.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from tasks.training.ranks import local_rank, world_size
from tasks.training.recipe import Recipe, RecipeError

log = logging.getLogger(__name__)


class ModelError(RuntimeError):
    """A model is not what the recipe asked for; the message says which part, and what to change."""


@dataclass(frozen=True)
class Placement:
    """Where a model is computed: device, dtype, and whether its language model's linears are held in 4 bits.

    Of a `sharded` model every process holds a part of each weight, for which 4-bit weights are packed into `dtype`.
    """

    device: torch.device
    dtype: torch.dtype
    four_bit: bool
    sharded: bool = False

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{name}, {str(self.dtype).removeprefix('torch.')}, {'NF4' if self.four_bit else 'not quantized'}"


def place(recipe: Recipe) -> Placement:
    """Resolve the recipe's `auto`s for this machine, and log what was chosen and why."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank())
    four_bit = recipe.quantization == "nf4" or (recipe.quantization == "auto" and on_gpu)
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    placement = Placement(
        torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu"),
        torch.bfloat16 if bf16 else torch.float32,
        four_bit,
        sharded=recipe.sharding != "none" and world_size() > 1,
    )
    log.info("device: %s", placement)
    if not on_gpu and recipe.quantization == "auto":
        log.info("no GPU: the base model is not quantized, because 4-bit weights are slower on a CPU, not faster")
    return placement


def load_processor(folder: str | Path, recipe: Recipe) -> ProcessorMixin:
    """Load the model's processor, with the recipe's bound on image tokens. Raises `ModelError` or `RecipeError`."""
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(processor, ProcessorMixin) or not hasattr(processor, "image_processor"):
        raise ModelError(f"{folder}: {type(processor).__name__} takes no images. Give a vision-language model.")
    if not processor.chat_template:
        raise ModelError(
            f"{folder}: the processor has no chat template, so prompts can't be written the way the model was taught. "
            "Use the instruction-tuned variant of the model, or add a chat_template.jinja to the folder."
        )
    if recipe.max_image_tokens is not None:
        _limit_image_tokens(processor, recipe.max_image_tokens)
    return processor


def _limit_image_tokens(processor: Any, tokens: int) -> None:
    images = processor.image_processor
    if not hasattr(images, "max_soft_tokens"):
        raise RecipeError(
            f"max_image_tokens: {type(images).__name__} has no setting for it (max_soft_tokens). Leave it empty."
        )
    images.max_soft_tokens = tokens
    processor.image_seq_length = tokens


def load_model(folder: str | Path, placement: Placement) -> PreTrainedModel:
    """Load the base model; raises `ModelError` if anything but the language model's linears came out in 4 bits.

    Reads safetensors only and runs no code of the model's own. Everything outside the language model, and its output
    head, stays in `placement.dtype`.
    """
    options = {}
    if placement.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=placement.dtype,
            bnb_4bit_quant_storage=placement.dtype if placement.sharded else torch.uint8,
            llm_int8_skip_modules=modules_beside_decoder(_skeleton(folder)),
        )
    model = AutoModelForMultimodalLM.from_pretrained(
        folder,
        dtype=placement.dtype,
        device_map={"": placement.device},
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
    assert isinstance(model, PreTrainedModel)
    check_quantization(model, four_bit=placement.four_bit)
    log.info("%s", describe(model))
    return model


def _skeleton(folder: str | Path) -> PreTrainedModel:
    """The model's modules without weights."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config)
    return model


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


def modules_beside_decoder(model: PreTrainedModel) -> list[str]:
    """Return the names of the largest modules that neither hold nor are the decoder: towers, projectors, the head."""
    path = decoder_name(model).split(".")
    beside = []
    for depth, part in enumerate(path):
        parent = model.get_submodule(".".join(path[:depth]))
        prefix = [*path[:depth]]
        beside += [".".join([*prefix, name]) for name, _ in parent.named_children() if name != part]
    return beside


def linear_names(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer of `model` by its dotted name, 4-bit ones included."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def is_four_bit(module: nn.Module) -> bool:
    """Whether the layer's weights are held in 4 bits by bitsandbytes."""
    return type(module).__name__ == "Linear4bit"


def check_quantization(model: PreTrainedModel, *, four_bit: bool) -> None:
    """Raise `ModelError` unless the decoder's linears, and no others, are 4-bit (or none is)."""
    inside = decoder_name(model) + "." if four_bit else "\0"
    wrong = [name for name, module in linear_names(model).items() if is_four_bit(module) != name.startswith(inside)]
    if wrong:
        raise ModelError(
            f"{len(wrong)} linear layers of {type(model).__name__} are 4-bit but should not be, or the reverse: "
            f"{', '.join(wrong[:5])}. Set quantization: none in the recipe, and report the model."
        )


def lora_targets(model: PreTrainedModel, pattern: str) -> list[str]:
    """Return the names of the decoder's linears whose last part `pattern` matches in full; `RecipeError` if none."""
    prefix = decoder_name(model) + "."
    linears = [name for name in linear_names(model) if name.startswith(prefix)]
    try:
        found = [name for name in linears if re.fullmatch(pattern, name.rpartition(".")[2])]
    except re.error as error:
        raise RecipeError(f"lora_targets: {pattern!r} is not a regular expression ({error}).") from None
    if not found:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise RecipeError(f"lora_targets: {pattern!r} matches no linear layer of the language model. Layers: {names}")
    return found


def add_lora(model: PreTrainedModel, recipe: Recipe, *, base_model: str) -> PeftModel:
    """Put fresh LoRA matrices on the recipe's targets; raises `ModelError` if they landed anywhere else.

    `base_model` is the name the adapter will remember its base model by.
    """
    targets = lora_targets(model, recipe.lora_targets)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=rf"{re.escape(decoder_name(model))}\..*\.({recipe.lora_targets})",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_model
    _check_lora(adapted, targets)
    return adapted


def load_adapter(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Put a trained adapter on its base model, switched on."""
    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def lora_names(model: PeftModel) -> list[str]:
    """Return the names, in the base model, of the layers that carry LoRA."""
    base = model.get_base_model()
    return [name for name, module in base.named_modules() if isinstance(module, LoraLayer)]


def _check_lora(model: PeftModel, targets: list[str]) -> None:
    wrong = sorted(set(lora_names(model)) ^ set(targets))
    if wrong:
        raise ModelError(
            f"LoRA sits on layers the recipe did not mean, or misses some it did: {', '.join(wrong[:5])}. "
            "Write a narrower lora_targets."
        )


def describe(model: PreTrainedModel) -> str:
    """Return one line on the model: class, size, and which of its linear layers are 4-bit."""
    linears = linear_names(model)
    plain = [name for name, module in linears.items() if not is_four_bit(module)]
    size = f"{type(model).__name__}: {model.num_parameters() / 1e6:,.1f} M parameters"
    if len(plain) == len(linears):
        return f"{size}, no linear layer in 4 bits"
    parts = [part for part in modules_beside_decoder(model) if any(name.startswith(part) for name in plain)]
    return f"{size}, {len(linears) - len(plain)} linear layers in 4 bits; not those of {', '.join(parts)}"
