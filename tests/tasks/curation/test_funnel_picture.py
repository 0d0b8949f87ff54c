"""The picture of a funnel."""

from pathlib import Path

import pytest
from PIL import Image

from tasks.curation.funnel import Funnel, Stage
from tasks.curation.funnel_picture import draw_funnel


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_funnel_gives_the_same_file(ending: str, tmp_path: Path):
    for name in ("a", "b"):
        draw_funnel(FUNNEL, tmp_path / f"{name}.{ending}")
    assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_the_bars_are_as_long_as_the_counts(tmp_path: Path):
    draw_funnel(FUNNEL, tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png").convert("RGB")
    kept = [sum(image.getpixel((x, y)) == (0x2A, 0x6F, 0x77) for x in range(image.width)) for y in range(image.height)]
    rejected = [
        sum(image.getpixel((x, y)) == (0xD8, 0xC9, 0xA8) for x in range(image.width)) for y in range(image.height)
    ]
    whole = max(kept)
    at_duplicates = max(y for y in range(image.height) if kept[y])  # the last bar
    assert kept[at_duplicates] == pytest.approx(whole / 4, rel=0.02)
    assert rejected[at_duplicates] == pytest.approx(whole / 4, rel=0.02)


FUNNEL = Funnel(
    "p",
    samples=1000,
    kept=250,
    conditions=(Stage("a", "x > 1", fails=500, fails_alone=500, remaining=500),),
    duplicates=(Stage("exact", "bytes", fails=250, fails_alone=250, remaining=250),),
)
