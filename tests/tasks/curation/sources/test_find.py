from pathlib import Path

import fsspec
import pytest

from tasks.curation.sources.contract import Layout, SourceError
from tasks.curation.sources.find import find_source_files
from tests.tasks.curation.source_files import pairs, write_folder, write_jsonl, write_parquet, write_tar


def found(source: Path | str, **options: str) -> list[tuple[str, str]]:
    return [(file.name, file.format) for file in find_source_files(str(source), **options)]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_a_path_through_a_parent_is_that_of_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "data/a.jsonl", "elsewhere/data/b.jsonl", "elsewhere/in/c.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "in")
    monkeypatch.chdir(tmp_path / "data")
    assert find_source_files("../data/*.jsonl") == find_source_files(str(tmp_path / "data"))
    assert find_source_files("../link/../data") == find_source_files(str(tmp_path / "elsewhere" / "data"))


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.tar", "webdataset"),
        ("a.TAR", "webdataset"),
        ("a.tar.gz", "webdataset"),
        ("a.tgz", "webdataset"),
        ("a.parquet", "parquet"),
        ("a.jsonl", "jsonl"),
    ],
)
def test_a_file_is_known_by_its_suffix(tmp_path: Path, name: str, format: str) -> None:
    touch(tmp_path, name)
    assert found(tmp_path / name) == [(name, format)]


def test_a_format_can_be_given_for_any_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.dat")
    with pytest.raises(SourceError, match="does not tell its format"):
        found(tmp_path / "a.dat")
    assert found(tmp_path / "a.dat", format="webdataset") == [("a.dat", "webdataset")]


def test_a_folder_is_searched_to_the_bottom_in_order(tmp_path: Path) -> None:
    touch(tmp_path, "b.tar", "a/c.parquet", "a/b.jsonl", "a/_SUCCESS", ".hidden/x.tar", "a/.x.tar", "a/readme.md")
    assert found(tmp_path) == [("b.jsonl", "jsonl"), ("c.parquet", "parquet"), ("b.tar", "webdataset")]


def test_a_given_format_limits_a_folder_to_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar", "b.parquet")
    assert found(tmp_path, format="parquet") == [("b.parquet", "parquet")]


def test_tables_that_img2dataset_writes_beside_its_archives_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "00000.tar", "00000.parquet", "00000_stats.json", "00001.tar.gz", "00001.parquet")
    assert found(tmp_path) == [("00000.tar", "webdataset"), ("00001.tar.gz", "webdataset")]


def test_tables_that_img2dataset_writes_beside_its_image_folders_are_passed_over(tmp_path: Path) -> None:
    write_folder(tmp_path / "00000", pairs(2))
    touch(tmp_path, "00000.parquet", "00000_stats.json")
    assert found(tmp_path) == [(tmp_path.name, "folder")]


def test_patterns_choose_files_and_folders(tmp_path: Path) -> None:
    touch(tmp_path, "a1.tar", "a2.tar", "b.tar", "c1/x.parquet")
    assert found(tmp_path / "a*.tar") == [("a1.tar", "webdataset"), ("a2.tar", "webdataset")]
    assert found(tmp_path / "[bc]*") == [("b.tar", "webdataset"), ("x.parquet", "parquet")]


def test_a_name_that_looks_like_a_pattern_is_a_name_if_it_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "data[1]/a.tar", "data1/b.tar")
    assert found(tmp_path / "data[1]") == [("a.tar", "webdataset")]


def test_the_same_file_is_the_same_whether_named_alone_or_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pairs(1))
    alone = find_source_files(str(tmp_path / "a.tar"))
    assert alone == find_source_files(str(tmp_path)) == find_source_files(f"{tmp_path}/*.tar")
    assert alone == find_source_files(f"file://{tmp_path}/a.tar")


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.tar")
    monkeypatch.chdir(tmp_path)
    (file,) = find_source_files("a.tar", image_folder="images")
    assert (file.uri, file.layout) == (str(tmp_path / "a.tar"), Layout(image_folder=str(tmp_path / "images")))


def test_other_filesystems_are_searched_alike(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for i, write in enumerate((write_tar, write_parquet, write_jsonl)):
        path = write(tmp_path / f"{i}{('.tar', '.parquet', '.jsonl')[i]}", pairs(2))
        memory.pipe(f"/found/{path.name}", path.read_bytes())
    files = find_source_files("memory://found")
    assert [file.uri for file in files] == [f"memory:///found/{n}" for n in ("0.tar", "1.parquet", "2.jsonl")]
    assert find_source_files("memory://found/*.tar") == files[:1]
    assert all(file.version for file in files)


@pytest.mark.parametrize("source", ["nothing", "nothing/*.tar", "someone/something"])
def test_nothing_there_is_an_error_that_says_what_to_give(tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceError, match=r"no such file or folder.*format huggingface in source_settings"):
        found(tmp_path / source)


def test_nothing_to_read_is_an_error_that_says_what_would_be(tmp_path: Path) -> None:
    touch(tmp_path, "readme.md")
    with pytest.raises(SourceError, match=r"found nothing to read. Expected \.tar.*\.jsonl"):
        found(tmp_path)
    with pytest.raises(SourceError, match="found nothing to read as parquet"):
        found(tmp_path, format="parquet")
