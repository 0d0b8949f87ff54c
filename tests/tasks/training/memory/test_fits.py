import pytest

from tasks.training.memory.estimate import estimate
from tasks.training.memory.fits import FREE_SHARE, Proposal, checkpointed_share_for, what_fits
from tasks.training.recipe import Recipe
from tests.tasks.training.memory.shapes import GIB, gemma_31b

SIX_LAYERS = gemma_31b(layers=6)
RECIPE = Recipe(base_model="m", quantization="nf4", lora_dropout=0.0, batch_size=4, accumulation=4)


def proposals(gib: int) -> dict[int | None, Proposal]:
    found = what_fits(SIX_LAYERS, RECIPE, gib * GIB, sample_tokens=384)
    return {proposal.max_image_tokens: proposal for proposal in found}


@pytest.fixture(scope="module")
def by_size() -> dict[int, dict[int | None, Proposal]]:
    return {gib: proposals(gib) for gib in (10, 24)}


def test_what_is_proposed_fits_and_keeps_the_samples_of_a_step(by_size: dict[int, dict[int | None, Proposal]]) -> None:
    for gib, found in by_size.items():
        assert set(found) == {70, 140, 280, 560, 1120}
        for proposal in found.values():
            assert proposal.batch_size * proposal.accumulation == 16
            assert proposal.estimate.peak_bytes <= gib * GIB * (1 - FREE_SHARE)


def test_an_estimate_of_a_proposal_says_the_same(by_size: dict[int, dict[int | None, Proposal]]) -> None:
    proposal = by_size[10][140]
    again = estimate(
        SIX_LAYERS,
        RECIPE.model_copy(update={"accumulation": proposal.accumulation, "max_image_tokens": 140}),
        batch=proposal.batch_size,
        sample_tokens=384 - 140,
        checkpointed_share=proposal.checkpointed_share,
    )
    assert again == proposal.estimate


def test_a_larger_gpu_is_used_for_speed(by_size: dict[int, dict[int | None, Proposal]]) -> None:
    for bound, small in by_size[10].items():
        assert by_size[24][bound].relative_time < small.relative_time
    assert by_size[24][280].checkpointed_share == 0


def test_nothing_is_proposed_where_nothing_fits() -> None:
    assert what_fits(SIX_LAYERS, RECIPE, 5 * GIB, sample_tokens=384) == []


def test_as_little_is_computed_again_as_fits() -> None:
    size = {"batch": 16, "sample_tokens": 384}
    share = checkpointed_share_for(SIX_LAYERS, RECIPE, 12 * GIB, **size)
    assert 0 < share < 1

    def fits(share: float) -> bool:
        found = estimate(SIX_LAYERS, RECIPE, checkpointed_share=share, **size)
        return found.peak_bytes <= 12 * GIB * (1 - FREE_SHARE)

    assert fits(share)
    assert not fits(share - 1 / 6)


def test_everything_is_computed_again_where_not_even_that_fits() -> None:
    assert checkpointed_share_for(SIX_LAYERS, RECIPE, 5 * GIB, batch=16, sample_tokens=384) == 1.0
