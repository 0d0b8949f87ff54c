"""The fast path's loss and gradients beside the plain path's, each as far from float32 as the other.

    python -m benchmarks.gpu.equal                      # 6 layers of the 31B, and the E2B
    python -m benchmarks.gpu.equal --only 31B:language  # one of them
    python -m benchmarks.gpu.equal --tiny               # the sample's model, anywhere

The same weights see the same samples on the plain path (PEFT's layers, not compiled, all recomputed, the vision tower
run anew) and on the fast one of `benchmarks.gpu.train`, each in float32 and in bfloat16. In float32 the two must agree;
in bfloat16, noise separates both from float32, and the fast path is right if it is no further away.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.gpu.shapes import SHAPES, gemma4_31b, random_model, tiny, write_processor
from benchmarks.gpu.train import SETTINGS, examples, recipe_of
from benchmarks.record import record
from tasks.training import model as models
from tasks.training.attention import use_short_attention
from tasks.training.batches import PaddedCollator
from tasks.training.conversations import make_collator
from tasks.training.features import FEATURES, PIXELS, FeatureInput
from tasks.training.fused_lora import fuse_lora
from tasks.training.speed import checkpoint_layers, compile_layers, decoder
from tasks.training.template import stop_ids

SAMPLES = 4
COMPARED = ("31B:language", "31B:vision", "E2B:language")
CONFIGS = SHAPES | {"31B": lambda: gemma4_31b(layers=6)}

Gradients = dict[str, Tensor]


def measure(name: str, folder: Path, *, on_tiny: bool) -> dict[str, Any]:
    """Compare the three paths of one of `train.SETTINGS`."""
    config = tiny() if on_tiny else CONFIGS[name.partition(":")[0]]()
    recipe = recipe_of(SETTINGS[name], write_processor(folder / "processor", config))
    if on_tiny:
        recipe = recipe.model_copy(update={"max_image_tokens": None, "quantization": "none"})
    processor = models.load_processor(recipe.base_model, recipe)
    rows = examples(recipe, folder, samples=SAMPLES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = random_model(config, four_bit=recipe.quantization == "nf4", device=device)
    model = models.make_trainable(base, recipe, parent=None).train()
    for weight_name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # as training does
        if "lora_B" in weight_name:
            nn.init.normal_(weight, std=0.002)  # zero at first, which would hide A's gradient
        if weight_name.endswith("q_norm.weight"):  # at 1, random weights attend to one token only: rounding decides
            weight.data.mul_(weight.numel() ** -0.5)
    collator = make_collator(processor, rows, stop_ids(base))
    padded = PaddedCollator(collator, processor.tokenizer.pad_token_id)(list(rows))

    checkpoint_layers(model, 1.0)
    plain = both_precisions(model, padded)

    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.gradient_checkpointing = False
    checkpoint_layers(model, recipe.checkpointed_share or 0.0)
    fused = fuse_lora(model)
    if not on_tiny:
        use_short_attention(decoder(model))
        compile_layers(model)

    fast = both_precisions(model, padded, cached=base if recipe.cache_vision_features else None)
    exact = plain.gradients_float32
    return {
        "setting": name,
        "decoder_layers": config.get_text_config().num_hidden_layers,
        "loss_float32_plain": plain.loss_float32,
        "loss_float32_fast": fast.loss_float32,
        "loss_bfloat16_plain": plain.loss,
        "loss_bfloat16_fast": fast.loss,
        "float32_fast_from_plain": error(fast.gradients_float32, exact),
        "lowest_float32_cosine": min(similarities(fast.gradients_float32, exact)),
        "bfloat16_plain_from_float32": error(plain.gradients, exact),
        "bfloat16_fast_from_float32": error(fast.gradients, exact),
        "lowest_bfloat16_cosine_plain": min(similarities(plain.gradients, exact)),
        "lowest_bfloat16_cosine_fast": min(similarities(fast.gradients, exact)),
        "weights_compared": len(exact),
        "lora_layers_fused": fused,
    }


@dataclass(frozen=True)
class Outcome:
    """Loss and gradients in both precisions."""

    loss_float32: float
    gradients_float32: Gradients
    loss: float
    gradients: Gradients


def both_precisions(model: nn.Module, batch: dict[str, Any], *, cached: PreTrainedModel | None = None) -> Outcome:
    """Compute as the model is now; with `cached`, the base model, from features of the images and not the images."""
    with in_float32(model), _features(cached, batch, autocast=False) as given:
        exact = outcome(model, given, autocast=False)
    with _features(cached, batch, autocast=True) as given:
        return Outcome(*exact, *outcome(model, given, autocast=True))


@contextmanager
def _features(base: PreTrainedModel | None, batch: dict[str, Any], *, autocast: bool) -> Iterator[dict[str, Any]]:
    if base is None:
        yield batch
        return
    source = FeatureInput(base)
    with torch.no_grad(), torch.autocast(base.device.type, torch.bfloat16, enabled=autocast):
        features = source.compute(_on(batch, base.device))
    yield {name: value for name, value in batch.items() if name != PIXELS} | {FEATURES: features}
    source.remove()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let the model compute in float32 with the weights it has; 4-bit ones are unpacked to what they are in bf16."""
    narrow = [weight for weight in model.parameters() if weight.dtype == torch.bfloat16]
    packed = [(module, module.compute_dtype) for module in model.modules() if isinstance(module, Linear4bit)]
    for weight in narrow:
        weight.data = weight.data.float()
    for module, _ in packed:
        module.compute_dtype = torch.float32
    yield
    for weight in narrow:
        weight.data = weight.data.bfloat16()
    for module, dtype in packed:
        module.compute_dtype = dtype


def outcome(model: Any, batch: dict[str, Any], *, autocast: bool) -> tuple[float, Gradients]:
    """Return the loss and the gradient of each trained weight, and leave none behind."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = model(**_on(batch, device), use_cache=False).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


def error(found: Gradients, wanted: Gradients) -> float:
    """The length of the difference of all gradients together, as a share of their length."""
    difference = sum((found[name] - wanted[name]).square().sum() for name in wanted)
    return float((difference / sum(gradient.square().sum() for gradient in wanted.values())) ** 0.5)


def similarities(found: Gradients, wanted: Gradients) -> list[float]:
    """The cosine of each weight's gradients."""
    return [float(nn.functional.cosine_similarity(found[n].flatten(), wanted[n].flatten(), dim=0)) for n in wanted]


def main() -> None:
    """Compare the settings asked for, print a table and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(COMPARED), choices=list(SETTINGS))
    parser.add_argument("--tiny", action="store_true", help="the sample's model, on whatever device there is")
    args = parser.parse_args()
    table = []
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            table.append(measure(name, Path(folder), on_tiny=args.tiny))
        print(*(f"{figure:30} {value}" for figure, value in table[-1].items()), sep="\n", flush=True)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        if not args.tiny:
            ratios = [row["bfloat16_fast_from_float32"] / row["bfloat16_plain_from_float32"] for row in table]
            figures = {
                "worst_float32_difference": max(row["float32_fast_from_plain"] for row in table),
                "worst_bfloat16_ratio": max(ratios),
                "comparisons": table,
                "samples": SAMPLES,
            }
            record("gpu_equal", figures, device=torch.cuda.get_device_name(0))


if __name__ == "__main__":
    main()
