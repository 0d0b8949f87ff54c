"""Checks (c) and (d): LoRA and 4-bit weights are where the recipe means them, and nowhere else."""

import re

from tasks.training.families import Part
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.modules import OTHER, PARTS, ModuleRow, module_table
from tasks.training.preflight.setup import Setup

TARGETS, BITS = "trained layers", "quantisation"
MOSTLY = 0.5
"""Share of the language model's bytes outside its linear layers above which 4 bits save little."""


def check_targets(setup: Setup) -> list[Finding]:
    """Compare the layers that have LoRA, and the weights trained beside it, with the recipe, part by part."""
    table = module_table(setup.base)
    findings = [_targets_of(part, [row for row in table if row.part == part], setup) for part in PARTS]
    bypassed = [row for row in table if row.clipping == "bypassed"]
    kept = sum(row.adapted for row in table if row.clipping == "kept")
    if bypassed or kept:
        findings.append(
            Finding.judge(
                TARGETS,
                "clipping",
                not bypassed,
                measured=f"kept around {kept} layers with LoRA, bypassed in {sum(row.adapted for row in bypassed)}"
                + (f" ({', '.join(sorted({row.module for row in bypassed}))})" if bypassed else ""),
                wanted="activations clipped around layer and LoRA together, as the base model was trained",
                remedy="Put LoRA on the linear layer inside the clipping one (its name ends in .linear).",
            )
        )
    return [finding for finding in findings if finding is not None]


def check_quantization(setup: Setup) -> list[Finding]:
    """Compare what is held in 4 bits, and in which dtype the rest is, with the recipe, part by part."""
    table = module_table(setup.base)
    findings = [_bits_of(part, [row for row in table if row.part == part], setup) for part in PARTS]
    return [finding for part in findings for finding in part]


def _targets_of(part: Part, rows: list[ModuleRow], setup: Setup) -> Finding | None:
    recipe = setup.recipe
    linear = [row for row in rows if row.module != OTHER]
    if not rows:
        return None
    has_lora = recipe.method == "lora" and part in recipe.lora_parts
    in_full = ("language" if part == "head" else part) in recipe.full_parts
    matching = sum(row.layers for row in linear if re.fullmatch(recipe.lora_targets, row.module))
    adapted, layers = sum(row.adapted for row in linear), sum(row.layers for row in linear)
    trained, weights = sum(row.trained_weights for row in rows), sum(row.weights for row in rows)
    # the pattern speaks of the language model's layers: those of other parts have names of their own
    lora_good = (adapted == matching > 0 if part == "language" else adapted > 0) if has_lora else adapted == 0
    full_good = trained > 0 if in_full else trained == 0
    wanted_lora = (f"LoRA on the {matching} that match" if part == "language" else "LoRA") if has_lora else "no LoRA"
    return Finding.judge(
        TARGETS,
        part,
        lora_good and full_good,
        measured=f"LoRA on {adapted} of {layers} linear layers ({_millions(sum(r.adapter_weights for r in rows))}); "
        f"{_millions(trained)} of {_millions(weights)} own weights trained",
        wanted=f"{wanted_lora}, own weights {'trained' if in_full else 'frozen'}",
        remedy="Set lora_parts, lora_targets and full_parts to what you mean, or use a model whose parts are known.",
    )


def _bits_of(part: Part, rows: list[ModuleRow], setup: Setup) -> list[Finding]:
    linear = [row for row in rows if row.module != OTHER]
    if not rows:
        return []
    four_bit = setup.placement.four_bit and part == "language" and part not in setup.recipe.full_parts
    layers, packed = sum(row.layers for row in linear), sum(row.layers for row in linear if row.four_bit)
    dtypes = ", ".join(sorted({row.dtype for row in rows if not row.four_bit and row.bytes})) or "tied to other weights"
    gib = sum(row.bytes for row in rows) / 2**30
    plan = Finding.judge(
        BITS,
        part,
        packed == (layers if four_bit else 0),
        measured=f"{packed} of {layers} linear layers 4-bit, the rest {dtypes}; {gib:.2f} GiB",
        wanted=f"{'all' if four_bit else 'none'} in 4 bits",
        remedy="Set quantization: none, and report the model: its names don't tell which layers to leave alone.",
    )
    return [plan, *_too_wide(part, rows, setup), *(_unpacked(part, rows) if four_bit else [])]


def _too_wide(part: Part, rows: list[ModuleRow], setup: Setup) -> list[Finding]:
    """Frozen weights in fp32 beside a model in bf16: what preparing a model for k-bit training leaves behind."""
    dtype = str(setup.placement.dtype).removeprefix("torch.")
    wide = [row for row in rows if row.dtype == "float32" != dtype and not row.trained_weights]
    extra = sum(row.bytes for row in wide) // 2
    if extra < 2**20:
        return []
    where = ", ".join(sorted({row.module for row in wide}))
    measured = f"{extra / 2**30:.2f} GiB more than in {dtype}: {where}"
    return [Finding(BITS, f"{part}, frozen weights in fp32", "noted", measured, f"{dtype}", "Load them in bf16.")]


def _unpacked(part: Part, rows: list[ModuleRow]) -> list[Finding]:
    """Weights that are no linear layer's and so stay wide: experts held as one tensor, but also embeddings."""
    other = sum(row.bytes for row in rows if row.module == OTHER)
    share = other / max(1, sum(row.bytes for row in rows))
    if share <= MOSTLY:
        return []
    measured = f"{other / 2**30:.2f} GiB, {share:.0%} of the part, are embeddings, norms or experts"
    remedy = "4 bits save little on this model; see the memory check."
    return [Finding(BITS, f"{part}, not in linear layers", "noted", measured, "mostly linear layers", remedy)]


def _millions(weights: int) -> str:
    return f"{weights / 1e6:,.2f} M"
