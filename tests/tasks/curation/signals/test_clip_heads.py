"""The signals that are measured from CLIP's stored embeddings: LAION's two heads."""

import json
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from storage.fingerprint import file_digest
from storage.warehouse import Warehouse
from tasks.curation import batch
from tasks.curation.score import score_shard
from tasks.curation.signals.aesthetic import Aesthetic
from tasks.curation.signals.clip import Clip
from tasks.curation.signals.clip_nsfw import ClipNsfw
from tasks.curation.signals.contract import MissingWeights
from tasks.curation.signals.pinned_file import PinnedFile
from tests.tasks.curation.images import encoded, photograph, write_shard
from tests.tasks.curation.signals.test_clip import SHIPPED, TINY

SIZES = {"aesthetic": (768, 1024, 128, 64, 16, 1), "clip_nsfw": (768, 64, 512, 256, 1)}
IMAGES = [encoded(photograph(seed=seed), "PNG") for seed in range(4)] + [b"no image"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    """A tiny random model whose embeddings are as long as those of ViT-L/14."""
    folder, config = tmp_path_factory.mktemp("clip"), {**TINY, "embed_dim": 768}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    return Clip(f"local-dir:{folder}")


def pinned(path: Path) -> PinnedFile:
    return PinnedFile(file=str(path), sha256=file_digest(path))


def random_weights(kind: str) -> dict[str, torch.Tensor]:
    """A state dict with the names that the published files have."""
    torch.manual_seed(1)
    sizes = SIZES[kind]
    places = (0, 2, 4, 6, 7) if kind == "aesthetic" else (1, 2, 3, 4)
    weights = {}
    for place, inputs, outputs in zip(places, sizes[:-1], sizes[1:], strict=True):
        layer = f"layers.{place}" if kind == "aesthetic" else f"linear_{place}"
        weights[f"{layer}.weight"] = torch.randn(outputs, inputs) / inputs**0.5
        weights[f"{layer}.bias"] = torch.randn(outputs)
    if kind == "clip_nsfw":
        weights |= {"norm.mean": torch.randn(768) / 28, "norm.variance": torch.rand(768) / 700 + 1e-4}
    return weights


def aesthetic_written_out(vector: torch.Tensor, weights: dict[str, torch.Tensor]) -> float:
    for place in (0, 2, 4, 6, 7):
        vector = nn.functional.linear(vector, weights[f"layers.{place}.weight"], weights[f"layers.{place}.bias"])
    return float(vector)


def safety_written_out(vector: torch.Tensor, weights: dict[str, torch.Tensor]) -> float:
    vector = (vector - weights["norm.mean"]) / weights["norm.variance"] ** 0.5
    for place in (1, 2, 3):
        vector = nn.functional.linear(vector, weights[f"linear_{place}.weight"], weights[f"linear_{place}.bias"])
        vector = vector.clamp(min=0)
    logit = nn.functional.linear(vector, weights["linear_4.weight"], weights["linear_4.bias"])
    return float(1 / (1 + torch.exp(-logit)))


KINDS = {
    "aesthetic": (Aesthetic, "aesthetic_score", aesthetic_written_out),
    "clip_nsfw": (ClipNsfw, "clip_nsfw_score", safety_written_out),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_network_written_out_on_the_stored_embeddings(
    warehouse: Warehouse, tmp_path: Path, clip: Clip, kind: str
) -> None:
    signal, name, written_out = KINDS[kind]
    weights = random_weights(kind)
    torch.save(weights, tmp_path / "head.pth")
    shard = write_shard(warehouse, IMAGES)
    refs = [o.ref for o in score_shard(shard, [clip, signal(clip, pinned(tmp_path / "head.pth"))], warehouse=warehouse)]
    embeddings, scores = (warehouse.read_table(ref.table(shard)).to_pylist() for ref in refs)
    assert [row["sample_id"] for row in scores] == [row["sample_id"] for row in embeddings]
    assert [row[name] is None for row in scores] == [False, False, False, False, True]
    for row, embedding in zip(scores[:4], embeddings, strict=False):
        vector = torch.tensor(np.array(embedding["image_embedding"], np.float32))
        assert row[name] == pytest.approx(written_out(vector, weights), rel=1e-4)


def test_a_head_added_later_reads_no_image_and_gives_the_same_table(
    warehouse: Warehouse, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(random_weights("aesthetic"), tmp_path / "head.pth")
    head = Aesthetic(clip, pinned(tmp_path / "head.pth"))
    shard = write_shard(warehouse, IMAGES)
    score_shard(shard, [clip, head], warehouse=warehouse)
    path = warehouse.local_path(head.ref.table(shard))
    at_once = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(batch, "EncodedImage", None)  # whoever decodes now fails
    outcomes = score_shard(shard, [clip, head], warehouse=warehouse)
    assert [outcome.cached for outcome in outcomes] == [True, False]
    assert path.read_bytes() == at_once


def test_the_fingerprint_follows_the_backbone_and_the_weights(tmp_path: Path, clip: Clip) -> None:
    torch.save(random_weights("aesthetic"), tmp_path / "one.pth")
    torch.save({}, tmp_path / "two.pth")
    one = Aesthetic(clip, pinned(tmp_path / "one.pth"))
    assert one.ref != Aesthetic(clip, pinned(tmp_path / "two.pth")).ref
    assert one.ref != Aesthetic(Clip(clip.model, text_embedding=True), pinned(tmp_path / "one.pth")).ref


def test_the_archive_that_laion_publishes_is_read_as_it_is(warehouse: Warehouse, tmp_path: Path, clip: Clip) -> None:
    torch.save(random_weights("clip_nsfw"), tmp_path / "clip_autokeras_binary_nsfw.pth")
    with zipfile.ZipFile(tmp_path / "head.zip", "w") as archive:
        archive.write(tmp_path / "clip_autokeras_binary_nsfw.pth", "clip_autokeras_binary_nsfw.pth")
    shard = write_shard(warehouse, IMAGES[:2])
    (_, packed) = score_shard(shard, [clip, ClipNsfw(clip, pinned(tmp_path / "head.zip"))], warehouse=warehouse)
    plain = ClipNsfw(clip, pinned(tmp_path / "clip_autokeras_binary_nsfw.pth"))
    (_, unpacked) = score_shard(shard, [clip, plain], warehouse=warehouse)
    tables = [warehouse.read_table(outcome.ref.table(shard)) for outcome in (packed, unpacked)]
    assert tables[0].equals(tables[1])


class Trap:
    """What a hostile weights file would run on loading."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("sprung"),)


def test_a_file_with_code_in_it_is_refused_and_not_run(
    warehouse: Warehouse, tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layers.0.weight": Trap()}, tmp_path / "head.pth")
    with pytest.raises(MissingWeights, match="does not hold the weights of the aesthetic head"):
        score_shard(
            write_shard(warehouse, IMAGES[:1]),
            [clip, Aesthetic(clip, pinned(tmp_path / "head.pth"))],
            warehouse=warehouse,
        )
    assert not Path("sprung").exists()


def test_weights_of_another_head_are_refused_with_what_is_wanted(
    warehouse: Warehouse, tmp_path: Path, clip: Clip
) -> None:
    torch.save(random_weights("clip_nsfw"), tmp_path / "head.pth")
    with pytest.raises(MissingWeights, match=r"Give a PyTorch state dict of layers\.0\.weight \(1024, 768\)"):
        score_shard(
            write_shard(warehouse, IMAGES[:1]),
            [clip, Aesthetic(clip, pinned(tmp_path / "head.pth"))],
            warehouse=warehouse,
        )


def test_a_backbone_of_another_length_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    torch.save(random_weights("aesthetic"), tmp_path / "head.pth")
    with pytest.raises(
        ValueError, match=r"takes the 768 numbers of OpenAI's ViT-L/14, and CLIP local-dir:.* gives \d+"
    ):
        Aesthetic(Clip(f"local-dir:{SHIPPED}"), pinned(tmp_path / "head.pth")).ref  # noqa: B018


def test_a_source_that_was_not_measured_is_named(warehouse: Warehouse, tmp_path: Path, clip: Clip) -> None:
    torch.save(random_weights("aesthetic"), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="aesthetic is measured from clip, which is not measured for shard shard"):
        score_shard(
            write_shard(warehouse, IMAGES[:1]), [Aesthetic(clip, pinned(tmp_path / "head.pth"))], warehouse=warehouse
        )
