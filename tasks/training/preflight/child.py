"""The preflight's own process: loads what a training would load, runs the checks on it and leaves no trace in it."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.training import model as models
from tasks.training.conversations import make_collator
from tasks.training.dataset import read_examples
from tasks.training.families import without_adapter
from tasks.training.model import ModelError, Placement
from tasks.training.preflight.data import check_data
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.gradients import check_gradients
from tasks.training.preflight.layers import check_quantization, check_targets
from tasks.training.preflight.learning import check_images, check_learning, check_learning_rate
from tasks.training.preflight.masks import check_mask, check_prompt, spans
from tasks.training.preflight.memory import check_memory, has_room_for_all
from tasks.training.preflight.modules import module_table
from tasks.training.preflight.setup import Setup, checkpointed_share
from tasks.training.recipe import Recipe, RecipeError
from tasks.training.speed import checkpoint_layers
from tasks.training.template import TemplateError, stop_ids

log = logging.getLogger(__name__)

Check = Callable[[Setup], list[Finding]]

CHECKS: tuple[Check, ...] = (
    check_mask,
    check_prompt,
    check_targets,
    check_quantization,
    check_gradients,
    check_images,
    check_learning,
    check_learning_rate,
    check_data,
    check_memory,
)
COMPUTING: tuple[Check, ...] = (check_gradients, check_images, check_learning)
"""Those of them that compute with the model."""
SHOWN_ROWS = 3
LOADING = "loading"


def run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run all checks; `config` is that of a training: recipe, model (folder), examples (file), parent_adapter.

    Returns findings, modules (the model as a table) and spans (some rows as the model sees them), as JSON.
    """
    recipe = Recipe.model_validate(config["recipe"])
    try:
        setup = load(recipe, config)
    except (ModelError, RecipeError, TemplateError) as error:
        wanted, remedy = "a model as the recipe asks for", "Change what the message names."
        refused = Finding(LOADING, recipe.base_model, "failed", str(error), wanted, remedy)
        return {"findings": [asdict(refused)], "modules": [], "spans": []}
    findings = run_checks(setup, CHECKS) if setup.has_weights else check_without_weights(setup)
    return {
        "findings": [asdict(finding) for finding in findings],
        "modules": [asdict(row) for row in module_table(setup.base)],
        "spans": [asdict(span) for span in spans(setup, setup.rows()[:SHOWN_ROWS])],
    }


def load(recipe: Recipe, config: Mapping[str, Any]) -> Setup:
    """Return what a training with the same `config` would start from, without weights if one device can't hold all."""
    placement = models.place(recipe)
    processor = models.load_processor(config["model"], recipe)
    model = _model(recipe, placement, config)
    examples = read_examples(Path(config["examples"]))
    share = checkpointed_share(recipe, placement)
    return Setup(
        recipe,
        placement,
        processor,
        model,
        make_collator(processor, examples, stop_ids(without_adapter(model))),
        examples,
        partial(checkpointing, model, share) if share else None,
    )


def _model(recipe: Recipe, placement: Placement, config: Mapping[str, Any]) -> PeftModel | PreTrainedModel:
    """The model that is trained; without its weights if several GPUs are to share them and one can't hold them all."""
    if recipe.sharding != "none" and not placement.four_bit:
        bare = models.load_skeleton(config["model"], placement.dtype)
        model = models.make_trainable(bare, recipe, parent=None)
        if not has_room_for_all(model, placement):
            return model
    base = models.load_model(config["model"], placement)
    return models.make_trainable(base, recipe, parent=config["parent_adapter"])


@contextmanager
def checkpointing(model: PeftModel | PreTrainedModel, share: float) -> Iterator[None]:
    """Compute this share (0-1) of the decoder's layers again in the backward pass, as the training does."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    checkpoint_layers(model, share)
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False


def run_checks(setup: Setup, checks: tuple[Check, ...]) -> list[Finding]:
    """Return the findings of all checks, in order; a check that can't be finished has failed."""
    findings: list[Finding] = []
    for check in checks:
        started = time.monotonic()
        name = _name(check)
        try:
            found = check(setup)
        except Exception as error:  # whatever goes wrong here would go wrong in the training
            log.exception("the check of %s ended with an error", name)
            measured = f"ended with {type(error).__name__}: {error}"
            found = [Finding(name, "check", "failed", measured, "an answer", "The log has the full error.")]
        findings += found
        log.info("%s: %s (%.1f s)", name, _verdict(found), time.monotonic() - started)
    return findings


def check_without_weights(setup: Setup) -> list[Finding]:
    """Return the findings of the checks that need no weights, and a note on each of those left out."""
    left_out = [
        Finding(
            _name(check),
            "check",
            "noted",
            "left out: one device can't hold the whole model with its gradients, and the preflight uses one",
            "an answer",
            "Preflight the recipe with a smaller model of the same family, and watch the first steps' loss.",
        )
        for check in COMPUTING
    ]
    return run_checks(setup, tuple(check for check in CHECKS if check not in COMPUTING)) + left_out


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_").replace("_", " ")


def _verdict(findings: list[Finding]) -> str:
    for status in ("failed", "noted"):
        if count := sum(finding.status == status for finding in findings):
            return f"{count} {status}"
    return "ok"
