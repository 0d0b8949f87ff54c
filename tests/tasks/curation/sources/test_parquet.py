import datetime
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.curation.sources.contract import Fault, Layout, RawSample, Reason, Row, SourceError, SourceFile
from tasks.curation.sources.parquet import read_parquet
from tests.tasks.curation.source_files import pairs, picture, write_parquet

IMAGE = picture(0)


def rows(path: Path, **layout: str) -> list[Row]:
    return list(read_parquet(SourceFile(str(path), "parquet", path.stat().st_size, "1", Layout(**layout))))


def write(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def brief(found: Sequence[Row]) -> list[tuple[str | None, object]]:
    return [(row.key, row.reason if isinstance(row, Fault) else row.caption) for row in found]


def test_img2dataset_rows_keep_key_bytes_caption_url_and_the_other_fields(tmp_path: Path) -> None:
    samples, urls = pairs(70), [f"https://example.org/{i}" for i in range(70)]
    path = write_parquet(tmp_path / "a.parquet", samples, url=urls, status=["success"] * 70, width=list(range(70)))
    for i, (row, (key, image, caption)) in enumerate(zip(rows(path), samples, strict=True)):
        expected = {"txt": caption, "status": "success", "width": i}
        assert row == RawSample(key, f"row {i}", image, None, caption, urls[i], expected)


def test_a_failed_download_is_a_fault_with_its_message(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.parquet",
        key=["1", "2", "3"],
        jpg=pa.array([IMAGE, None, None], pa.binary()),
        caption=["a", "b", "c"],
        status=["success", "failed_to_download", "success"],
        error_message=[None, "HTTP Error 404", None],
    )
    found = rows(path)
    assert brief(found) == [("1", "a"), ("2", Reason.DOWNLOAD_FAILED), ("3", Reason.MISSING_IMAGE)]
    assert isinstance(found[1], Fault)
    assert "HTTP Error 404" in found[1].detail


def test_image_structs_hold_bytes_or_a_path(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.jpg").write_bytes(picture(1))
    structs = [
        {"bytes": IMAGE, "path": "x/a.jpg"},
        {"bytes": None, "path": "images/b.jpg"},
        {"bytes": None, "path": "images/c.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = write(tmp_path / "a.parquet", image=pa.array(structs, kind), text=list("abcde"))
    found = rows(path)
    missing = Reason.MISSING_IMAGE
    expected = [("x/a.jpg", "a"), ("images/b.jpg", "b"), ("images/c.jpg", Reason.MISSING_FILE), *[(None, missing)] * 2]
    assert brief(found) == expected
    assert [(row.image, row.image_name) for row in found if isinstance(row, RawSample)] == [
        (IMAGE, "a.jpg"),
        (picture(1), "b.jpg"),
    ]


def test_paths_are_read_from_the_image_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(IMAGE)
    path = write(tmp_path / "a.parquet", file_name=["a.jpg"], caption=["a"])
    assert brief(rows(path)) == [("a.jpg", Reason.MISSING_FILE)]
    assert brief(rows(path, image_folder=str(tmp_path / "pictures"))) == [("a.jpg", "a")]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_every_type_of_bytes_and_text_can_be_read(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
    for i, text in enumerate(texts):
        column = pa.array(["a"]).cast(text) if i < 2 else pa.array(["a"]).dictionary_encode()
        path = write(tmp_path / f"{i}.parquet", image=pa.array([IMAGE], kind), caption=column)
        (row,) = rows(path)
        assert isinstance(row, RawSample)
        assert (row.image, row.caption) == (IMAGE, "a")


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", left=[IMAGE], right=[picture(1)], en=["one"], de=["eins"], number=[7])
    (row,) = rows(path, image_column="right", caption_column="de", key_column="number")
    assert isinstance(row, RawSample)
    assert (row.key, row.image, row.caption) == ("7", picture(1), "eins")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"left": [IMAGE], "right": [IMAGE], "caption": ["x"]}, r"no image column.*left \(bytes\), right \(bytes\)"),
        ({"jpg": [IMAGE], "png": [IMAGE], "caption": ["x"]}, "jpg and png could each be the image.*image_column"),
        ({"jpg": [IMAGE], "text": ["x"], "txt": ["x"]}, "text and txt could each be the caption.*caption_column"),
        ({"jpg": [IMAGE], "url": ["x"]}, r"no caption column.*jpg \(bytes\), url \(text\)"),
        ({"number": [1]}, r"no image column.*number \(number\)"),
    ],
)
def test_columns_that_can_not_be_told_apart_are_an_error_that_names_them(
    tmp_path: Path, columns: dict[str, object], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        rows(write(tmp_path / "a.parquet", **columns))


@pytest.mark.parametrize(
    ("columns", "caption"),
    [({"caption": [7], "license": ["cc0"]}, 7), ({"caption": [["x", "y"]]}, ["x", "y"]), ({"caption": [b"x"]}, b"x")],
)
def test_a_caption_column_of_another_type_is_the_caption_all_the_same(
    tmp_path: Path, columns: dict[str, object], caption: object
) -> None:
    (row,) = rows(write(tmp_path / "a.parquet", jpg=[IMAGE], **columns))
    assert isinstance(row, RawSample)
    assert row.caption == caption


@pytest.mark.parametrize("image", [7, {"url": "https://example.org"}, [1.5]])
def test_an_image_column_of_another_type_is_a_fault_a_row(tmp_path: Path, image: object) -> None:
    faults = rows(write(tmp_path / "a.parquet", jpg=[image, None], caption=["x", "y"]))
    assert [fault.reason for fault in faults if isinstance(fault, Fault)] == ["not_an_image", "missing_image"]


@pytest.mark.parametrize("option", ["image_column", "caption_column", "key_column"])
def test_a_named_column_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path: Path, option: str) -> None:
    path = write(tmp_path / "a.parquet", jpg=[IMAGE], caption=["x"])
    with pytest.raises(SourceError, match=rf"'nope', given as {option}. Columns: jpg \(bytes\), caption \(text\)"):
        rows(path, **{option: "nope"})


def test_a_column_that_can_not_hold_images_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", jpg=[IMAGE], caption=["x"], number=[1])
    with pytest.raises(SourceError, match="'number' can not hold images"):
        rows(path, image_column="number")


def test_the_only_text_column_is_the_caption_whatever_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", photo=[IMAGE], beschreibung=["x"], url=["https://example.org"])
    (row,) = rows(path)
    assert isinstance(row, RawSample)
    assert (row.image, row.caption, row.url) == (IMAGE, "x", "https://example.org")


def test_text_that_is_not_utf8_is_handed_on_as_lone_surrogates(tmp_path: Path) -> None:
    broken = pa.array([b"caf\xe9"], pa.binary()).view(pa.string())
    path = write(tmp_path / "a.parquet", jpg=[IMAGE], caption=broken, note=broken)
    (row,) = rows(path)
    assert isinstance(row, RawSample)
    assert (row.caption, row.metadata) == ("caf\udce9", {"note": "caf\udce9"})


def test_any_type_can_be_metadata(tmp_path: Path) -> None:
    moment = datetime.datetime(2026, 1, 2, 3, 4, 5)
    path = write(tmp_path / "a.parquet", jpg=[IMAGE], caption=["x"], time=[moment], list=[[1, None]], map=[{"a": 1.5}])
    (row,) = rows(path)
    assert isinstance(row, RawSample)
    assert row.metadata == {"time": moment, "list": [1, None], "map": {"a": 1.5}}


def test_rows_before_a_break_in_the_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, pa.schema([("jpg", pa.binary()), ("caption", pa.string())])) as writer:
        for _, image, caption in pairs(40):
            writer.write_table(pa.table({"jpg": [image], "caption": [caption]}), row_group_size=1)
    data = bytearray(path.read_bytes())
    place = data.find(pairs(40)[35][1]) - 30
    data[place : place + 30] = bytes(30)
    path.write_bytes(data)
    found = rows(path)
    assert isinstance(found[-1], Fault)
    assert found[-1].reason is Reason.BROKEN_ARCHIVE
    assert brief(found[:-1]) == [(None, caption) for _, _, caption in pairs(len(found) - 1)]
    assert len(found) - 1 >= 32


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet" * 10])
def test_what_is_no_parquet_file_is_one_fault(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    assert brief(rows(tmp_path / "a.parquet")) == [(None, Reason.BROKEN_ARCHIVE)]
