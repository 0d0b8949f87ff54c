"""Blurred faces: in one image, and in the published copies of a pool."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from storage import snapshot
from storage.refs import PoolRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.columns import EvidenceError
from tasks.curation.decide import decide
from tasks.curation.face_blur import CELLS, blur_faces
from tasks.curation.policy import Policy
from tasks.curation.publish import publish
from tasks.curation.score import score_shard
from tasks.curation.signals import SignalSettings, build_signals
from tasks.curation.signals.faces import Faces
from tests.tasks.curation.images import encoded, kinds_of_files, measured, oriented, photograph, write_shard
from tests.tasks.curation.signals.portrait import FACE, portrait

BOX = (30, 20, 70, 50)
POLICY = Policy(name="all")


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_the_box_is_blurred_beyond_recognition_and_the_rest_is_as_before() -> None:
    image = photograph(200, 150)
    blurred = pixels(blur_faces(encoded(image, "PNG"), [BOX]))
    changed = (blurred != np.asarray(image)).any(axis=2)
    inside = np.zeros_like(changed)
    inside[20 - 6 : 50 + 6, 30 - 7 : 70 + 7] = True
    assert not changed[~inside].any()
    middle = blurred[28:42, 40:60]
    assert changed[28:42, 40:60].mean() > 0.9
    step = np.abs(np.diff(middle, axis=1)).mean()
    assert step < np.abs(np.diff(np.asarray(image).astype(int)[28:42, 40:60], axis=1)).mean() / 3


def test_no_more_is_left_of_a_face_than_a_few_colours() -> None:
    """Two faces whose means over the cells are the same come out the same, however they differ in between."""
    plain = Image.new("RGB", (12 * CELLS, 12 * CELLS), (100, 100, 100))
    dotted = np.full((12 * CELLS, 12 * CELLS, 3), 100, np.uint8)
    dotted[::2, ::2], dotted[1::2, 1::2] = 90, 110
    box = (0, 0, 12 * CELLS, 12 * CELLS)
    middle = slice(3 * CELLS, 9 * CELLS)
    results = [pixels(blur_faces(encoded(image, "PNG"), [box])) for image in (plain, Image.fromarray(dotted))]
    assert np.array_equal(results[0][middle, middle], results[1][middle, middle])


def test_the_detector_finds_no_face_any_more(tmp_path: Path) -> None:
    blurred = blur_faces(encoded(portrait(), "JPEG", quality=95), [FACE])
    (row,) = measured(Faces(), Warehouse(str(tmp_path)), [blurred])
    assert row["faces"] == 0


@pytest.mark.parametrize("kind", list(kinds_of_files()))
def test_every_kind_of_file_is_published_upright_as_jpeg_or_png(kind: str) -> None:
    image = Image.open(io.BytesIO(blur_faces(kinds_of_files()[kind], [(5, 5, 20, 20)])))
    assert image.format == ("JPEG" if kind.startswith(("jpeg", "mpo")) else "PNG")
    assert image.size == ((61, 97) if kind in ("jpeg_turned", "png_turned") else (97, 61))
    assert not image.getexif()


def test_boxes_count_from_the_upright_corner_and_may_touch_the_edge() -> None:
    image = photograph(60, 40)
    turned = oriented(image.rotate(90, expand=True), "PNG", 6)
    boxes = [(0, 0, 20, 20), (50, 30, 60, 40)]
    assert np.array_equal(pixels(blur_faces(turned, boxes)), pixels(blur_faces(encoded(image, "PNG"), boxes)))


def published(
    warehouse: Warehouse, signals: tuple[str, ...], **options: bool
) -> tuple[dict[str, dict], snapshot.Manifest]:
    """A pool of a portrait and a picture without faces, curated; rows by key."""
    images = [encoded(portrait(), "JPEG", quality=90), encoded(photograph(), "PNG")]
    shard = write_shard(warehouse, images)
    pool = PoolRef("pool", (shard,))
    refs: list[SignalRef] = [
        outcome.ref
        for outcome in score_shard(shard, build_signals(SignalSettings(measure=signals)), warehouse=warehouse)
    ]
    decisions = decide(pool, POLICY, refs, [], warehouse=warehouse).ref
    outcome = publish("set", pool, decisions, POLICY, refs, [], warehouse=warehouse, **options)
    manifest = snapshot.read_manifest(warehouse, outcome.ref)
    (entry,) = manifest.curated
    rows = {row["key"]: row for row in warehouse.read_table(entry.path).to_pylist()}
    return rows, manifest


def test_only_images_with_faces_are_written_anew_and_a_column_says_which(tmp_path: Path) -> None:
    warehouse = Warehouse(str(tmp_path))
    rows, manifest = published(warehouse, ("size", "faces"), blur_faces=True)
    original = warehouse.read_table("pools/pool/shard.parquet").to_pylist()
    with_face, without = rows["key 0"], rows["key 1"]
    assert (with_face["faces"], with_face["faces_blurred"]) == (1, 1)
    assert (without["faces"], without["faces_blurred"]) == (0, 0)
    assert without["image"] == original[1]["image"]
    left, top, right, bottom = FACE
    before, after = pixels(original[0]["image"]["bytes"]), pixels(with_face["image"]["bytes"])
    assert np.abs(before - after)[top:bottom, left:right].mean() > 5 * np.abs(before - after)[300:].mean()
    assert with_face["file_bytes"] == len(original[0]["image"]["bytes"])  # measurements are of the original
    assert manifest.blur_faces


def test_the_pool_keeps_its_bytes_and_the_unblurred_snapshot_its_file(tmp_path: Path) -> None:
    warehouse = Warehouse(str(tmp_path))
    plain, first = published(warehouse, ("faces",))
    before = warehouse.local_path("pools/pool/shard.parquet").read_bytes()
    _, second = published(warehouse, ("faces",), blur_faces=True)
    again, third = published(warehouse, ("faces",))
    assert warehouse.local_path("pools/pool/shard.parquet").read_bytes() == before
    assert "faces_blurred" not in plain["key 0"]
    assert [manifest.number for manifest in (first, second, third)] == [1, 2, 3]
    assert first.curated == third.curated != second.curated
    assert again == plain


def test_blurring_the_same_again_is_the_same_snapshot(tmp_path: Path) -> None:
    warehouse = Warehouse(str(tmp_path))
    numbers = [published(warehouse, ("faces",), blur_faces=True)[1].number for _ in range(2)]
    assert numbers == [1, 1]


def test_faces_that_were_not_looked_for_cannot_be_blurred(tmp_path: Path) -> None:
    with pytest.raises(EvidenceError, match="Add faces to what is measured"):
        published(Warehouse(str(tmp_path)), ("size",), blur_faces=True)
