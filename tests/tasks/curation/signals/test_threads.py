"""Detectors are shared by the decoding threads: what they find must not depend on what other threads look at."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from tasks.curation.signals.contract import Signal
from tasks.curation.signals.faces import Faces
from tasks.curation.signals.text_area import TextArea
from tests.tasks.curation.images import encoded, photograph, pixels_of
from tests.tasks.curation.signals.portrait import portrait


def images() -> list[bytes]:
    written = Image.new("RGB", (300, 200), "white")
    ImageDraw.Draw(written).text((20, 60), "OPEN", fill="black", font=ImageFont.load_default(60))
    face = portrait().resize((300, 300))
    return [encoded(image, "PNG") for image in (face, written, ImageOps.mirror(face), photograph(200, 150))]


@pytest.mark.parametrize("signal", [Faces(), TextArea()], ids=lambda signal: signal.name)
def test_several_threads_find_what_one_finds(signal: Signal) -> None:
    def look(data: bytes) -> object:
        return signal.view(pixels_of(data))

    expected = [look(data) for data in images()]
    assert len({str(found) for found in expected}) > 1
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(look, images() * 3)) == expected * 3
