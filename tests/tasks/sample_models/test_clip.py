import io
import itertools
import random
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image, ImageOps

import tasks.sample_models
from tasks.curation.policy import load_policy
from tasks.curation.sample_alterations import encode_altered
from tasks.curation.sample_images import ImageFile, draw_everyday_format, draw_size, encode
from tasks.curation.scene import Scene, describe, draw_scene, draw_unlike, render
from tasks.sample_models.make_clip import BOUNDARY, COPY_BOUNDARY, copy_loss, pair_loss

FOLDER = Path(tasks.sample_models.__file__).parent / "clip"
POLICY = FOLDER.parents[2] / "deployments" / "policies" / "sample.yaml"
PAIRS = 200
COPIES = 60


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any, Any]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{FOLDER}", require_pretrained=True)
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{FOLDER}")


@pytest.fixture(scope="module")
def pictures() -> list[tuple[Scene, ImageFile]]:
    """Never-seen pictures as the sample pool has them."""
    rng = random.Random("a seed that training does not use")
    drawn = []
    for _ in range(PAIRS):
        scene = draw_scene(rng)
        picture = render(scene, size=draw_size(rng), seed=rng.getrandbits(64))
        drawn.append((scene, encode(picture, file_format=draw_everyday_format(rng), rng=rng)))
    return drawn


def embed(clip: tuple[Any, Any, Any], files: list[ImageFile]) -> torch.Tensor:
    model, preprocess, _ = clip
    pixels = [preprocess(ImageOps.exif_transpose(Image.open(io.BytesIO(file.data)))) for file in files]
    with torch.inference_mode():
        return model.encode_image(torch.stack(pixels), normalize=True)


@pytest.fixture(scope="module")
def images(clip: tuple[Any, Any, Any], pictures: list[tuple[Scene, ImageFile]]) -> torch.Tensor:
    return embed(clip, [file for _, file in pictures])


@pytest.fixture(scope="module")
def cosines(
    clip: tuple[Any, Any, Any], pictures: list[tuple[Scene, ImageFile]], images: torch.Tensor
) -> tuple[list[float], list[float]]:
    """Cosines of never-seen pictures with their own caption, and with one that shares no colour or shape."""
    model, _, tokenize = clip
    rng = random.Random("captions")
    texts = [text for scene, _ in pictures for text in (describe(scene, rng), describe(draw_unlike(scene, rng), rng))]
    with torch.inference_mode():
        captions = model.encode_text(tokenize(texts), normalize=True).unflatten(0, (PAIRS, 2))
    own, other = torch.einsum("pe,pce->cp", images, captions).tolist()
    return own, other


def test_matched_pairs_score_above_mismatched_ones(cosines: tuple[list[float], list[float]]) -> None:
    own, other = cosines
    wins = sum((one > two) + 0.5 * (one == two) for one, two in itertools.product(own, other))
    assert wins / PAIRS**2 >= 0.97


def test_the_boundary_rejects_mismatches_and_keeps_matches(cosines: tuple[list[float], list[float]]) -> None:
    own, other = cosines
    assert sum(cosine < BOUNDARY for cosine in other) >= 0.95 * PAIRS
    assert sum(cosine >= BOUNDARY for cosine in own) >= 0.98 * PAIRS


def test_the_samples_policy_tells_altered_copies_from_different_pictures(
    clip: tuple[Any, Any, Any], pictures: list[tuple[Scene, ImageFile]], images: torch.Tensor
) -> None:
    rng = random.Random("alterations")
    altered = embed(clip, [encode_altered(file.data, rng=rng) for _, file in pictures[:COPIES]])
    joined = (images @ torch.cat([images, altered]).T).triu(1) >= 1 - load_policy(POLICY).parameters["epsilon"]
    right = int(joined.diagonal(PAIRS).sum())
    assert right >= 0.95 * COPIES
    assert right >= 0.95 * int(joined.sum())


def test_the_folder_is_at_most_five_megabytes() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 5_000_000


def test_any_text_can_be_scored(clip: tuple[Any, Any, Any]) -> None:
    model, _, tokenize = clip
    texts = ["", "IMG_0371.jpg", "这张图片的背景是红色的", "word " * 500, "\N{GRINNING FACE}"]
    with torch.inference_mode():
        features = model.encode_text(tokenize(texts), normalize=True)
    assert torch.isfinite(features).all()


def test_captions_differing_in_case_only_score_alike(clip: tuple[Any, Any, Any]) -> None:
    tokenize = clip[2]
    assert torch.equal(tokenize("Two red circles on the left"), tokenize("two RED circles on the left"))


def test_the_loss_is_smallest_where_matched_cosines_are_high_and_others_low() -> None:
    scale = torch.tensor(20.0)
    good = 0.9 * torch.eye(4)
    swapped = good.roll(1, dims=0)
    flat = torch.full((4, 4), BOUNDARY)
    assert pair_loss(good, scale=scale) < pair_loss(flat, scale=scale) < pair_loss(swapped, scale=scale)


def test_the_loss_tells_absolute_scores_apart_where_ranking_alone_would_not() -> None:
    scale = torch.tensor(100.0)
    above = torch.full((4, 4), 0.0).fill_diagonal_(0.8)
    assert pair_loss(above, scale=scale) < pair_loss(above - 0.7, scale=scale)


def test_the_loss_of_copies_is_smallest_where_they_are_near_and_all_others_far() -> None:
    good = torch.cat([0.99 * torch.eye(4), torch.zeros(4, 4)], dim=1)
    with_a_near_stranger = good.clone()
    with_a_near_stranger[0, 6] = 0.99
    flat = torch.full((4, 8), COPY_BOUNDARY)
    assert copy_loss(good) < copy_loss(with_a_near_stranger) < copy_loss(good.roll(1, dims=1))
    assert copy_loss(good) < copy_loss(flat)


def test_the_loss_of_copies_counts_the_nearest_stranger_most() -> None:
    cosine = torch.cat([0.99 * torch.eye(2), torch.tensor([[0.9, 0.5], [0.5, 0.5]])], dim=1).requires_grad_()
    copy_loss(cosine).backward()
    gradient = cosine.grad
    assert gradient is not None
    assert gradient[0, 2] > 100 * gradient[0, 3] > 0
