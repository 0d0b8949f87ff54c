"""Loads a base model, its processor and adapters the way a recipe says, and checks that they came out that way.

What is 4-bit and what gets LoRA is derived from the model's own modules: names differ between architectures, and a
pattern that matches nothing, or the vision tower, leaves the loss looking fine.
"""

import logging
import re
from collections.abc import Mapping
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
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import GENERATION_CONFIG_NAME

from tasks.training.distributed import whole_weights
from tasks.training.experts import check_fits_in_nf4
from tasks.training.families import ModelError as ModelError
from tasks.training.families import (
    decoder_name,
    find_family,
    limit_image_tokens,
    missing_part,
    parts_of,
    whole_modules,
    without_adapter,
)
from tasks.training.full import is_saved_in_full, load_weights, save_weights, train_in_full
from tasks.training.ranks import is_first, local_rank, world_size
from tasks.training.recipe import Recipe, RecipeError, Sharding
from tasks.training.template import complete_template

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Where a model is computed: device, dtype, and whether its language model's linears are held in 4 bits.

    With `sharding` every process comes to hold a part of each weight, for which 4-bit weights are packed into `dtype`.
    """

    device: torch.device
    dtype: torch.dtype
    four_bit: bool
    sharding: Sharding = "none"

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{name}, {str(self.dtype).removeprefix('torch.')}, {'NF4' if self.four_bit else 'not quantized'}"

    @property
    def sharded(self) -> bool:
        """Whether several processes share each weight."""
        return self.sharding != "none"

    @property
    def loaded_whole(self) -> bool:
        """Whether the whole model is on the device before anything is shared: 4-bit weights come to be only there."""
        return self.four_bit or not self.sharded


def place(recipe: Recipe) -> Placement:
    """Resolve the recipe's `auto`s for this machine, and log what was chosen and why."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank())
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and on_gpu)
    placement = Placement(
        torch.device("cuda", local_rank()) if on_gpu else torch.device("cpu"),
        torch.bfloat16 if bf16 else torch.float32,
        recipe.is_four_bit(on_gpu=on_gpu),
        recipe.sharding if world_size() > 1 else "none",
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
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        limit_image_tokens(processor, find_family(config.model_type), recipe.max_image_tokens)
    processor.chat_template = complete_template(processor)
    return processor


def load_model(folder: str | Path, placement: Placement) -> PreTrainedModel:
    """Load the base model; raises `ModelError` if anything but the language model's linears came out in 4 bits.

    Reads safetensors only and runs no code of the model's own. Everything outside the language model, and its output
    head, stays in `placement.dtype`. Raises `ModelError` too if a 4-bit model is larger than the GPU.
    Of a model that FSDP is to share, unless it is `loaded_whole`, the first process gets all weights on the CPU and the
    others none (`meta`), for `sharding.share_out`; of one for ZeRO-3 each gets its part (see `distributed.loading`).
    """
    if placement.sharding == "fsdp" and not placement.loaded_whole and not is_first():
        return load_skeleton(folder, placement.dtype)
    options: dict[str, Any] = {}
    if placement.four_bit:
        skeleton = load_skeleton(folder)
        if placement.device.type == "cuda":
            memory = torch.cuda.get_device_properties(placement.device).total_memory
            check_fits_in_nf4(skeleton, memory, dtype=placement.dtype)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=placement.dtype,
            bnb_4bit_quant_storage=placement.dtype if placement.sharded else torch.uint8,
            llm_int8_skip_modules=modules_beside_decoder(skeleton),
        )
    model = AutoModelForMultimodalLM.from_pretrained(
        folder,
        dtype=placement.dtype,
        device_map={"": placement.device} if placement.loaded_whole else None,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )
    assert isinstance(model, PreTrainedModel)
    check_quantization(model, four_bit=placement.four_bit)
    _keep_in_place(model)
    log.info("%s", describe(model))
    if placement.sharded and placement.loaded_whole:
        log.info(
            "4-bit weights are shared once they are whole on each GPU: %.2f GiB", model.get_memory_footprint() / 2**30
        )
    return model


def _keep_in_place(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from rearranging 4-bit weights on a CPU when they are first used outside of training.

    That is for good: they give no gradients to the layers below any more, and are dequantized wrongly.
    """
    for module in linear_names(model).values():
        if is_four_bit(module):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def load_skeleton(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the model's modules, without weights (on `meta`)."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model: PreTrainedModel = AutoModelForMultimodalLM.from_config(config, dtype=dtype)
    if Path(folder, GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


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


def lora_layers(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Return the names of the layers that get LoRA: those that `lora_targets` matches, and all linears of other parts.

    Raises `RecipeError` if a part that the recipe names has none.
    """
    parts = parts_of(model)
    found = lora_targets(model, recipe.lora_targets) if "language" in recipe.lora_parts else []
    for part in recipe.lora_parts:
        if part != "language":
            # a subclass may be called in ways that LoRA does not see, as in SigLIP's attention pooling
            plain = [name for name, module in linear_names(model).items() if type(module) is nn.Linear]
            inside = [name for name in plain if parts.of(name) == part]
            if not inside and parts.roots_of(part):
                raise RecipeError(
                    f"lora_parts: the {part} of {type(model).__name__} has no linear layer that LoRA could sit on. "
                    f"Write {part} into full_parts instead."
                )
            if not inside:
                raise RecipeError(f"lora_parts: {missing_part(model, part)}")
            found += inside
    return found


def add_lora(model: PreTrainedModel, recipe: Recipe, *, base_model: str) -> PeftModel:
    """Put fresh LoRA matrices on the recipe's layers, and copies to train beside parts that it trains in full.

    `base_model` is the name the adapter will remember its base model by. Raises `RecipeError` if a pattern or part
    matches nothing, `ModelError` if LoRA landed anywhere else.
    """
    layers = lora_layers(model, recipe)
    for field in ("rank_pattern", "alpha_pattern"):
        _check_patterns(field, getattr(recipe, field), layers)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        rank_pattern=dict(recipe.rank_pattern),
        alpha_pattern=dict(recipe.alpha_pattern),
        target_modules=_pattern_of(layers),
        modules_to_save=[name for part in recipe.full_parts for name in whole_modules(model, part)] or None,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_model
    _check_lora(adapted, layers)
    return adapted


def _pattern_of(names: list[str]) -> str:
    """A regular expression that matches the names in full, and those of the same layers in other blocks."""

    def pattern(name: str) -> str:
        *path, last = name.split(".")  # a last number tells layers of one block apart
        return r"\.".join([*(r"\d+" if part.isdigit() else part for part in path), last])

    return "|".join(sorted({pattern(name) for name in names}))


def _check_patterns(field: str, patterns: Mapping[str, int], layers: list[str]) -> None:
    for pattern in patterns:
        try:
            matched = any(re.match(rf"(.*\.)?({pattern})$", name) for name in layers)  # as PEFT matches it
        except re.error as error:
            raise RecipeError(f"{field}: {pattern!r} is not a regular expression ({error}).") from None
        if not matched:
            raise RecipeError(
                f"{field}: {pattern!r} matches the end of no layer that gets LoRA, such as {layers[0]}. Correct it."
            )


def load_adapter(
    model: PreTrainedModel, folder: str | Path, *, trained_with: Recipe | None = None
) -> PeftModel | PreTrainedModel:
    """Put on its base model what a training left in `folder`: an adapter, switched on, or weights trained in full.

    An adapter that is `trained_with` a recipe from there on has gradients, and that recipe's dropout. Raises
    `ModelError` if they are not safetensors or don't fit.
    """
    if is_saved_in_full(folder):
        return load_weights(model, folder)
    if not Path(folder, "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{folder}: holds no adapter_model.safetensors. Pickled weights (adapter_model.bin) are not read, because "
            "they can run code: load them where that does no harm, and save them again with PEFT's save_pretrained."
        )
    config = LoraConfig.from_pretrained(str(folder))
    if trained_with:
        config.lora_dropout, config.base_model_name_or_path = trained_with.lora_dropout, trained_with.base_model
    return PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=trained_with is not None)


def make_trainable(base: PreTrainedModel, recipe: Recipe, *, parent: str | Path | None) -> PeftModel | PreTrainedModel:
    """Return `base` with gradients for what the recipe trains, starting from the folder that a parent run left."""
    if recipe.method == "full":
        return train_in_full(load_weights(base, parent) if parent else base, recipe)
    if parent:
        return load_adapter(base, parent, trained_with=recipe)
    return add_lora(base, recipe, base_model=recipe.base_model)


def save_trained(model: PeftModel | PreTrainedModel, folder: Path, recipe: Recipe, *, dtype: torch.dtype) -> None:
    """Leave in `folder` what was trained, for `load_adapter`: PEFT's files, or in `dtype` what was trained in full.

    Of several processes all must call it; the first writes.
    """
    weights = whole_weights(model, torch.float32 if isinstance(model, PeftModel) else dtype)
    if not is_first():
        return
    if not isinstance(model, PeftModel):
        save_weights(weights, folder, parts=recipe.full_parts)
        return
    model.save_pretrained(str(folder), state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # an unfilled form; the run's table says more


def lora_names(model: PeftModel | PreTrainedModel) -> list[str]:
    """Return the names, in the base model, of the layers that carry LoRA; none if the model has no adapter."""
    base = without_adapter(model)
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
