import pytest

from storage.warehouse import Warehouse
from tasks.curation.signals.size import Size
from tests.tasks.curation.images import encoded, kinds_of_files, measured, oriented, photograph


def test_size_is_that_of_the_upright_image(warehouse: Warehouse) -> None:
    (row,) = measured(Size(), warehouse, [oriented(photograph(90, 60), "JPEG", 6)])
    assert (row["width"], row["height"], row["aspect"]) == (60, 90, 1.5)


@pytest.mark.parametrize("data", [b"", b"not an image"])
def test_an_unreadable_file_has_only_its_bytes(warehouse: Warehouse, data: bytes) -> None:
    (row,) = measured(Size(), warehouse, [data])
    assert row == dict.fromkeys(Size.columns.names) | {"file_bytes": len(data)}


def test_formats_frames_and_bytes(warehouse: Warehouse) -> None:
    files = kinds_of_files()
    names = ["jpeg", "png", "webp_animated", "tiff", "avif"]
    rows = measured(Size(), warehouse, [files[name] for name in names])
    assert [row["format"] for row in rows] == ["jpeg", "png", "webp", "tiff", "avif"]
    assert [row["frames"] for row in rows] == [1, 1, 3, 1, 1]
    assert [row["file_bytes"] for row in rows] == [len(files[name]) for name in names]


def test_a_broken_body_does_not_hide_the_size(warehouse: Warehouse) -> None:
    (row,) = measured(Size(), warehouse, [encoded(photograph(90, 60), "PNG")[:300]])
    assert (row["width"], row["height"]) == (90, 60)
