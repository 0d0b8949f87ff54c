import importlib.util

import pytest
from PIL import Image, ImageDraw, ImageFont

from storage.warehouse import Warehouse
from tasks.curation.signals import text_area
from tasks.curation.signals.contract import MissingWeights
from tasks.curation.signals.text_area import TextArea
from tests.tasks.curation.images import encoded, measured, photograph

FONT = ImageFont.load_default(36)


def written(*lines: tuple[tuple[int, int], str]) -> tuple[Image.Image, float]:
    """An image with lines of text on it, and the share of it that their boxes cover."""
    image = Image.new("RGB", (480, 320), (215, 225, 235))
    draw = ImageDraw.Draw(image)
    area = 0.0
    for place, text in lines:
        draw.text(place, text, fill=(20, 20, 20), font=FONT)
        left, top, right, bottom = draw.textbbox(place, text, font=FONT)
        area += (right - left) * (bottom - top) / (480 * 320)
    return image, area


def test_lines_are_counted_and_their_area_is_about_that_drawn(warehouse: Warehouse) -> None:
    one, one_area = written(((60, 40), "SALE TODAY"))
    two, two_area = written(((60, 40), "SALE TODAY"), ((120, 220), "free delivery"))
    rows = measured(TextArea(), warehouse, [encoded(image, "PNG") for image in (one, two)])
    assert [row["text_boxes"] for row in rows] == [1, 2]
    for row, area in zip(rows, (one_area, two_area), strict=True):
        assert area < row["text_area"] < 2 * area  # the detector leaves a margin about the letters
        assert row["legible_area"] == row["text_area"]


def test_what_is_taken_for_text_but_cannot_be_read_is_told_apart(warehouse: Warehouse) -> None:
    blank, written_on = photograph(640, 480), photograph(640, 480)
    ImageDraw.Draw(written_on).text((100, 200), "BUY NOW", fill=(255, 255, 255), font=ImageFont.load_default(80))
    rows = measured(TextArea(), warehouse, [encoded(image, "PNG") for image in (blank, written_on)])
    assert rows[0]["text_area"] > 0.1  # noise
    assert rows[0]["legible_area"] == 0
    assert 0.08 < rows[1]["legible_area"] < 0.25


def test_images_without_text_and_odd_ones_have_none(warehouse: Warehouse) -> None:
    rows = measured(TextArea(), warehouse, [encoded(photograph(*size), "PNG") for size in ((97, 61), (1, 1), (4, 300))])
    assert rows == [{"text_boxes": 0, "text_area": 0, "legible_area": 0}] * 3


def test_an_undecodable_image_has_nulls(warehouse: Warehouse) -> None:
    (row,) = measured(TextArea(), warehouse, [b"no image"])
    assert set(row.values()) == {None}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text_area._digest.cache_clear()
    with pytest.raises(MissingWeights, match=r"tamis\[ocr\]"):
        TextArea().ref  # noqa: B018
