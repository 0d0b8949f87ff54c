import json
from pathlib import Path

from tasks.curation.sources.contract import Fault, RawSample, Reason
from tasks.curation.sources.find import find_source_files
from tasks.curation.sources.read import read_rows
from tests.tasks.curation.source_files import pairs, picture, write_folder


def test_images_are_paired_with_the_text_beside_them(tmp_path: Path) -> None:
    samples = sorted(pairs(20))
    (file,) = find_source_files(str(write_folder(tmp_path / "pictures", samples)))
    assert file.format == "folder"
    found = [row for row in read_rows(file) if isinstance(row, RawSample)]
    assert [(row.key, row.image, row.caption) for row in found] == [(k, i, c.encode()) for k, i, c in samples]


def test_folders_below_are_read_and_belong_to_the_key(tmp_path: Path) -> None:
    write_folder(tmp_path / "b" / "c", pairs(1))
    write_folder(tmp_path, pairs(1))
    (file,) = find_source_files(str(tmp_path))
    assert [row.key for row in read_rows(file)] == ["000000000", "b/c/000000000"]


def test_json_beside_an_image_gives_caption_and_metadata(tmp_path: Path) -> None:
    (tmp_path / "_DSC1.v2.JPG").write_bytes(picture(0))
    (tmp_path / "_DSC1.v2.json").write_text(json.dumps({"caption": "x", "url": "u", "camera": "y"}))
    (row,) = read_rows(find_source_files(str(tmp_path))[0])
    assert row == RawSample("_DSC1.v2", "_DSC1.v2.JPG", picture(0), "_DSC1.v2.JPG", "x", "u", {"camera": "y"})


def test_an_image_without_a_caption_and_a_caption_without_an_image_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    (tmp_path / "b.txt").write_text("x")
    (tmp_path / ".hidden.jpg").write_bytes(b"?")
    first, second = read_rows(find_source_files(str(tmp_path))[0])
    assert isinstance(first, RawSample)
    assert first.caption is None
    assert isinstance(second, Fault)
    assert second.reason is Reason.MISSING_IMAGE


def test_its_version_changes_with_any_file(tmp_path: Path) -> None:
    (file,) = find_source_files(str(write_folder(tmp_path / "pictures", pairs(3))))
    assert find_source_files(str(tmp_path / "pictures")) == [file]
    (tmp_path / "pictures" / f"{pairs(1)[0][0]}.txt").write_text("caption 1")
    assert find_source_files(str(tmp_path / "pictures"))[0].version != file.version
