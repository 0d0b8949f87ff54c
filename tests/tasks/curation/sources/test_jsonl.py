import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.curation.sources import files, jsonl
from tasks.curation.sources.contract import Fault, Layout, RawSample, Reason, Row, SourceError, SourceFile
from tests.tasks.curation.source_files import pairs, picture, write_jsonl, write_lines

IMAGE = picture(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jpg").write_bytes(IMAGE)
    (tmp_path / "outside.jpg").write_bytes(IMAGE)
    return tmp_path / "source"


def rows(path: Path, **layout: str) -> list[Row]:
    return list(jsonl.read_jsonl(SourceFile(str(path), "jsonl", path.stat().st_size, "1", Layout(**layout))))


def brief(found: Sequence[Row]) -> list[tuple[str | None, object]]:
    return [(row.key, row.reason if isinstance(row, Fault) else row.caption) for row in found]


def test_rows_keep_key_bytes_caption_url_and_the_other_fields(tmp_path: Path) -> None:
    samples = pairs(30)
    path = write_jsonl(tmp_path / "a.jsonl", samples)
    lines = [json.loads(line) | {"url": "u", "n": i} for i, line in enumerate(path.read_text().splitlines())]
    for i, (row, (key, image, caption)) in enumerate(zip(rows(write_lines(path, lines)), samples, strict=True)):
        assert row == RawSample(key, f"line {i + 1}", image, f"{key}.jpg", caption, "u", {"n": i})


def test_the_image_path_is_the_key_where_there_is_none(folder: Path) -> None:
    assert brief(rows(write_lines(folder / "a.jsonl", [{"image_path": "a.jpg", "caption": "x"}]))) == [("a.jpg", "x")]


@pytest.mark.parametrize("fields", [{"file_name": "a.jpg", "text": "x"}, {"image": "a.jpg", "TEXT": "x", "id": 1}])
def test_other_usual_names_are_known(folder: Path, fields: dict[str, object]) -> None:
    (row,) = rows(write_lines(folder / "a.jsonl", [fields]))
    assert isinstance(row, RawSample)
    assert (row.image, row.caption) == (IMAGE, "x")


def test_names_can_be_given_and_missing_ones_are_an_error_that_names_the_fields(folder: Path) -> None:
    path = write_lines(folder / "a.jsonl", [{"picture": "a.jpg", "de": "eins", "en": "one"}])
    with pytest.raises(SourceError, match=r"a.jsonl, line 1: found no image column.*picture \(text\), de \(text\)"):
        rows(path)
    assert brief(rows(path, image_column="picture", caption_column="en")) == [("a.jpg", "one")]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(folder: Path) -> None:
    line = json.dumps({"image_path": "a.jpg", "caption": "x"})
    (folder / "a.jsonl").write_text(f"\ufeff{line}\r\n\n  \n{line}")
    assert brief(rows(folder / "a.jsonl")) == [("a.jpg", "x")] * 2


def test_a_bad_line_is_a_fault_and_the_rest_is_read(folder: Path) -> None:
    line = b'{"image_path": "a.jpg", "caption": "x"}'
    data = b"\n".join([b'{"image', b"[]", line, b'{"caption": "x"}', b'{"image_path": 3}', b'{"image_path": "a.jpg"}'])
    (folder / "a.jsonl").write_bytes(data)
    found = rows(folder / "a.jsonl")
    assert brief(found) == [
        (None, Reason.BAD_JSON),
        (None, Reason.BAD_JSON),
        ("a.jpg", "x"),
        (None, Reason.MISSING_IMAGE),
        (None, Reason.MISSING_IMAGE),
        ("a.jpg", None),
    ]
    assert [row.member for row in found] == [f"line {i}" for i in range(1, 7)]


def test_nothing_but_bad_lines_are_faults(folder: Path) -> None:
    (folder / "a.jsonl").write_text("x\ny\n")
    assert brief(rows(folder / "a.jsonl")) == [(None, Reason.BAD_JSON)] * 2


def test_a_line_over_the_limit_is_a_fault_and_never_read_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_TEXT_BYTES", 50)
    good = {"image_path": "a.jpg", "caption": "x"}
    path = write_lines(folder / "a.jsonl", [good, good | {"caption": "x" * 1000}, good])
    found = rows(path)
    assert brief(found) == [("a.jpg", "x"), (None, Reason.TOO_LARGE), ("a.jpg", "x")]
    assert found[1].data is not None
    assert len(found[1].data) == 51


@pytest.mark.parametrize("name", ["nothing.jpg", "a.jpg/b.jpg", "sub", "x" * 300, "a\0.jpg", "pipe"])
def test_an_image_that_can_not_be_opened_is_a_missing_file(folder: Path, name: str) -> None:
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    path = write_lines(folder / "a.jsonl", [{"image_path": name, "caption": "x"}])
    assert brief(rows(path)) == [(name, Reason.MISSING_FILE)]


@pytest.mark.parametrize(
    "name", ["../outside.jpg", "a/../../outside.jpg", "{outside}", "https://example.org/a.jpg", "file:///etc/hostname"]
)
def test_nothing_outside_the_image_folder_is_opened(folder: Path, name: str) -> None:
    name = name.format(outside=folder.parent / "outside.jpg")
    path = write_lines(folder / "a.jsonl", [{"image_path": name, "caption": "x"}])
    assert brief(rows(path)) == [(name, Reason.OUTSIDE_SOURCE)]


def test_a_folder_beginning_with_the_same_name_is_outside(folder: Path) -> None:
    path = write_lines(folder / "a.jsonl", [{"image_path": f"{folder}-2/a.jpg", "caption": "x"}])
    assert brief(rows(path)) == [(f"{folder}-2/a.jpg", Reason.OUTSIDE_SOURCE)]


def test_a_higher_image_folder_lets_paths_lead_there(folder: Path) -> None:
    names = ["outside.jpg", "source/../outside.jpg", str(folder.parent / "outside.jpg")]
    path = write_lines(folder / "a.jsonl", [{"image_path": name, "caption": "x"} for name in names])
    assert brief(rows(path, image_folder=str(folder.parent))) == [(name, "x") for name in names]
    assert [row.key for row in rows(path, image_folder="/") if isinstance(row, RawSample)] == names[2:]


def test_an_image_over_the_limit_is_a_fault_and_never_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (folder / "huge.jpg").open("wb") as file:
        file.truncate(files.MAX_IMAGE_BYTES + 1)
    path = write_lines(folder / "a.jsonl", [{"image_path": "huge.jpg", "caption": "x"}])
    assert brief(rows(path)) == [("huge.jpg", Reason.TOO_LARGE)]


def test_names_that_are_not_utf8_are_opened(folder: Path) -> None:
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(IMAGE)
    (folder / "a.jsonl").write_bytes(b'{"image_path": "caf\xe9.jpg", "caption": "caf\xe9"}\n')
    (row,) = rows(folder / "a.jsonl")
    assert isinstance(row, RawSample)
    assert (row.image, row.caption) == (IMAGE, "caf\udce9")


def test_order_is_that_of_the_lines_however_many_are_read_at_once(tmp_path: Path) -> None:
    samples = pairs(100)
    found = rows(write_jsonl(tmp_path / "a.jsonl", samples))
    assert [(row.key, row.data) for row in found] == [(key, image) for key, image, _ in samples]


def test_an_error_of_the_disk_is_not_the_rows_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, limit: int) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "_read_local", fail)
    with pytest.raises(OSError, match="Input/output error"):
        rows(write_lines(folder / "a.jsonl", [{"image_path": "a.jpg", "caption": "x"}]))
