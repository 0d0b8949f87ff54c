from pathlib import Path

import pytest
from PIL import Image, ImageOps

from storage.warehouse import Warehouse
from tasks.curation.signals import face_detector
from tasks.curation.signals.contract import MissingWeights
from tasks.curation.signals.faces import Faces
from tests.tasks.curation.images import encoded, measured, oriented, photograph
from tests.tasks.curation.signals.portrait import FACE, overlap, portrait


def faces(warehouse: Warehouse, *images: Image.Image) -> list[dict]:
    return measured(Faces(), warehouse, [encoded(image, "PNG") for image in images])


def test_a_face_is_found_where_another_implementation_finds_it(warehouse: Warehouse) -> None:
    (row,) = faces(warehouse, portrait())
    assert row["faces"] == 1
    (box,) = row["face_boxes"]
    assert overlap(box, FACE) > 0.9
    left, top, right, bottom = box
    assert row["face_area"] == pytest.approx((right - left) * (bottom - top) / 512**2)


def test_every_face_is_found_left_to_right_and_overlaps_count_once(warehouse: Warehouse) -> None:
    both = Image.new("RGB", (1024, 512))
    both.paste(portrait(), (0, 0))
    both.paste(ImageOps.mirror(portrait()), (512, 0))
    (row,) = faces(warehouse, both)
    expected = [FACE, (1024 - FACE[2], FACE[1], 1024 - FACE[0], FACE[3])]
    assert row["faces"] == 2
    assert all(overlap(box, place) > 0.8 for box, place in zip(row["face_boxes"], expected, strict=True))


def test_boxes_are_in_the_pixels_of_the_image_as_it_is_seen(warehouse: Warehouse) -> None:
    large = portrait().resize((1536, 1536))
    turned = oriented(large.rotate(90, expand=True), "PNG", 6)  # stored lying, said to be turned upright
    (row,) = measured(Faces(), warehouse, [turned])
    assert overlap(row["face_boxes"][0], [3 * side for side in FACE]) > 0.8


def test_where_nobody_is_there_are_no_faces(warehouse: Warehouse) -> None:
    rows = faces(warehouse, photograph(320, 240), Image.new("RGB", (50, 40)), photograph(1, 1), photograph(3, 900))
    assert [(row["faces"], row["face_area"], row["face_boxes"]) for row in rows] == [(0, 0.0, [])] * 4


def test_an_undecodable_image_has_nulls(warehouse: Warehouse) -> None:
    assert measured(Faces(), warehouse, [b"no image"]) == [{"faces": None, "face_area": None, "face_boxes": None}]


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(face_detector, "_PACKAGE", "no_such_package")
    with pytest.raises(MissingWeights, match=r"tamis\[faces\]"):
        Faces().ref  # noqa: B018
