import io
import json
import pickle
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageOps

from storage.warehouse import Warehouse
from tasks.curation.signals import clip_model
from tasks.curation.signals.clip import MAX_ASPECT, Clip
from tasks.curation.signals.clip_checkpoint import find_checkpoint
from tasks.curation.signals.contract import MissingWeights
from tests.tasks.curation.images import encoded, kinds_of_files, measured, photograph

SHIPPED = Path(str(files("tasks.sample_models"))) / "clip"
TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random vision transformer with open_clip's own tokenizer and preprocessing, as a local-dir."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**TINY).state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def by_open_clip(model_name: str, images: list[Image.Image], captions: list[str]) -> tuple[Any, Any]:
    model, _, preprocess = open_clip.create_model_and_transforms(model_name, require_pretrained=True)
    with torch.inference_mode():
        images_ = model.eval().encode_image(torch.stack([preprocess(i) for i in images]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer(model_name)(captions), normalize=True)
    return images_.numpy(), texts.numpy()


@pytest.mark.parametrize("is_shipped", [False, True])
def test_embeddings_and_scores_are_those_of_open_clip(warehouse: Warehouse, tiny: str, is_shipped: bool) -> None:
    name = f"local-dir:{SHIPPED}" if is_shipped else tiny
    kinds = kinds_of_files()
    data = [kinds[kind] for kind in ("jpeg", "jpeg_turned", "png_alpha", "png_palette", "webp_animated", "jpeg_cmyk")]
    images = [ImageOps.exif_transpose(Image.open(io.BytesIO(d))).convert("RGB") for d in data]
    captions = ["a red circle", "two dogs in the snow", "", "ein Haus", "a " * 100, "the last one"]
    expected_images, expected_texts = by_open_clip(name, images, captions)
    rows = measured(Clip(name, text_embedding=True), warehouse, data, captions)
    for row, image, text in zip(rows, expected_images, expected_texts, strict=True):
        assert row["clip_score"] == pytest.approx(float(image @ text), abs=2e-6)
        assert np.abs(np.array(row["image_embedding"]) - image).max() < 5e-4  # half a unit of f16 below 1
        assert np.abs(np.array(row["text_embedding"]) - text).max() < 5e-4


def test_embeddings_are_unit_vectors_of_half_floats(warehouse: Warehouse, tiny: str) -> None:
    signal = Clip(tiny)
    assert str(signal.columns.field("image_embedding").type) == "fixed_size_list<element: halffloat>[32]"
    (row,) = measured(signal, warehouse, [encoded(photograph(), "PNG")])
    assert np.linalg.norm(row["image_embedding"]) == pytest.approx(1, abs=1e-3)


def test_what_is_missing_is_null_and_the_rest_measured(warehouse: Warehouse, tiny: str) -> None:
    good = encoded(photograph(), "PNG")
    rows = measured(
        Clip(tiny, text_embedding=True), warehouse, [b"no image", good, good], ["a caption", None, "a caption"]
    )
    assert [row["clip_score"] is None for row in rows] == [True, True, False]
    assert [row["image_embedding"] is None for row in rows] == [True, False, False]
    assert [row["text_embedding"] is None for row in rows] == [False, True, False]


def test_a_long_banner_is_measured_without_being_blown_up(warehouse: Warehouse, tiny: str) -> None:
    banner = photograph(8000, 4)
    middle = banner.crop((4000 - 2 * MAX_ASPECT, 0, 4000 + 2 * MAX_ASPECT, 4))
    rows = measured(
        Clip(tiny), warehouse, [encoded(banner, "PNG"), encoded(middle, "PNG"), encoded(photograph(1, 1), "PNG")]
    )
    assert rows[0]["image_embedding"] == rows[1]["image_embedding"]
    assert rows[2]["clip_score"] is not None


def test_a_weights_file_of_a_known_architecture_is_used(
    warehouse: Warehouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.curation.signals.clip_checkpoint._architecture", lambda model: TINY)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", TINY)
    torch.manual_seed(1)
    model = open_clip.CLIP(**TINY)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    data = encoded(photograph(), "PNG")
    (row,) = measured(Clip("tiny", str(tmp_path / "weights.pt")), warehouse, [data], ["a caption"])
    _, _, preprocess = open_clip.create_model_and_transforms("tiny", load_weights=False)
    with torch.inference_mode():
        expected = model.eval().encode_image(preprocess(photograph())[None], normalize=True)
    assert np.abs(np.array(row["image_embedding"]) - expected[0].numpy()).max() < 5e-4


def test_the_fingerprint_follows_the_files_not_their_place(tiny: str, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny.removeprefix("local-dir:"), tmp_path / "copy")
    assert Clip(f"local-dir:{copy}").ref == Clip(tiny).ref
    weights = copy / "open_clip_pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    assert Clip(f"local-dir:{copy}").ref != Clip(tiny).ref


def test_settings_that_change_the_table_change_the_fingerprint(tiny: str) -> None:
    assert Clip(tiny).ref != Clip(tiny, text_embedding=True).ref


def test_an_unused_signal_is_small_to_send(tiny: str) -> None:
    signal = Clip(tiny)
    signal.ref  # noqa: B018 - resolves the checkpoint
    assert len(pickle.dumps(signal)) < 4096
    assert pickle.loads(pickle.dumps(signal)).ref == signal.ref


def test_a_folder_without_weights_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"there is no .*open_clip_config.json\. Give local-dir:<folder> with"):
        find_checkpoint(f"local-dir:{tmp_path}", None)
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(MissingWeights, match="holds no weights"):
        find_checkpoint(f"local-dir:{tmp_path}", None)


def test_a_tag_that_is_neither_cached_nor_reachable_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise Exception("no network")  # the hub's client raises no OSError either

    monkeypatch.setattr(clip_model, "_cached", lambda *_: None)
    monkeypatch.setattr(clip_model, "get_hf_file_metadata", unreachable)
    with pytest.raises(
        MissingWeights, match=r"ViT-B-32, weights 'openai': open_clip_model\.safetensors or .* is not in "
    ):
        find_checkpoint("ViT-B-32", "openai")


def test_a_cached_tag_brings_its_own_preprocessing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    monkeypatch.setattr(clip_model, "_cached", lambda *_: tmp_path / "weights")
    checkpoint = find_checkpoint("ViT-B-32", "openai")
    assert checkpoint.quick_gelu  # the architecture's own default would be another activation than it was trained with
    assert checkpoint.preprocessing["interpolation"] == "bicubic"
    assert checkpoint.embedding_size == 512


def test_unknown_names_are_answered_with_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no such architecture\. Did you mean ViT-B-32"):
        find_checkpoint("ViT-B-23", "openai")
    with pytest.raises(ValueError, match=r"no weights 'opneai' for it\. Tags: openai"):
        find_checkpoint("ViT-B-32", "opneai")
    with pytest.raises(MissingWeights, match=r"there is no weights file /nowhere/x\.pt"):
        find_checkpoint("ViT-B-32", "/nowhere/x.pt")
    with pytest.raises(MissingWeights, match="no weights given"):
        find_checkpoint("ViT-B-32", None)
