from pathlib import Path

import pytest

from tasks.training.memory.estimate import estimate
from tasks.training.memory.fits import FREE_SHARE, Proposal, checkpointed_share_for, run, what_fits
from tasks.training.recipe import Recipe
from tests.tasks.training.memory.shapes import GIB, gemma_31b

SIX_LAYERS = gemma_31b(layers=6)
RECIPE = Recipe(base_model="m", quantization="nf4", lora_dropout=0.0, batch_size=4, accumulation=2)


@pytest.fixture(scope="module")
def by_size() -> dict[int, Proposal]:
    """The best layout for texts of 768 tokens on GPUs of 8 and of 24 GiB."""
    return {gib: what_fits(SIX_LAYERS, RECIPE, gib * GIB, sample_tokens=768, images=0)[0] for gib in (8, 24)}


def test_what_is_proposed_fits_and_keeps_the_samples_of_a_step(by_size: dict[int, Proposal]) -> None:
    for gib, proposal in by_size.items():
        assert proposal.batch_size * proposal.accumulation == 8
        assert proposal.estimate.peak_bytes <= gib * GIB * (1 - FREE_SHARE)


def test_an_estimate_of_a_proposal_says_the_same(by_size: dict[int, Proposal]) -> None:
    proposal = by_size[8]
    recipe = RECIPE.model_copy(update={"accumulation": proposal.accumulation})
    share = proposal.checkpointed_share
    again = estimate(
        SIX_LAYERS, recipe, batch=proposal.batch_size, sample_tokens=768, images=0, checkpointed_share=share
    )
    assert again == proposal.estimate


def test_a_larger_gpu_is_used_for_speed(by_size: dict[int, Proposal]) -> None:
    assert by_size[24].relative_time < by_size[8].relative_time
    assert by_size[24].checkpointed_share == 0


def test_each_bound_on_image_tokens_gets_a_proposal() -> None:
    recipe = RECIPE.model_copy(update={"batch_size": 1})
    found = what_fits(SIX_LAYERS, recipe, 24 * GIB, sample_tokens=384)
    assert [proposal.max_image_tokens for proposal in found] == [70, 140, 280, 560, 1120]
    assert {proposal.tokens_per_batch // proposal.batch_size for proposal in found} == {174, 244, 384, 664, 1224}


def test_nothing_is_proposed_where_nothing_fits() -> None:
    assert what_fits(SIX_LAYERS, RECIPE, 4 * GIB, sample_tokens=384, images=0) == []


def test_the_child_process_says_what_would_be_needed_at_least(tmp_path: Path) -> None:
    SIX_LAYERS.save_pretrained(tmp_path)
    sample = {"sample_tokens": 384, "images": 0, "supervised_tokens": 64}
    config = {"config": str(tmp_path / "config.json"), "recipe": RECIPE.model_dump(), "device_bytes": 4 * GIB, **sample}
    found = run(config, tmp_path)
    assert found["proposals"] == []
    assert "GiB at the" in found["least"]


def test_as_little_is_computed_again_as_fits() -> None:
    size = {"batch": 16, "sample_tokens": 384, "images": 0}
    share = checkpointed_share_for(SIX_LAYERS, RECIPE, 12 * GIB, **size)
    assert 0 < share < 1

    def fits(share: float) -> bool:
        found = estimate(SIX_LAYERS, RECIPE, checkpointed_share=share, **size)
        return found.peak_bytes <= 12 * GIB * (1 - FREE_SHARE)

    assert fits(share)
    assert not fits(share - 1 / 6)


def test_everything_is_computed_again_where_not_even_that_fits() -> None:
    assert checkpointed_share_for(SIX_LAYERS, RECIPE, 5 * GIB, batch=16, sample_tokens=384, images=0) == 1.0
