import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tasks.curation.sources.contract import RawSample, SourceError
from tasks.curation.sources.find import find_source_files
from tasks.curation.sources.read import read_rows
from tests.tasks.curation.source_files import pairs, picture, write_dataset


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_saved_dataset_gives_its_images_as_they_were_put_in(tmp_path: Path) -> None:
    samples = pairs(70)
    (file,) = find_source_files(str(write_dataset(tmp_path / "data", samples)))
    assert file.format == "huggingface"
    found = [row for row in read_rows(file) if isinstance(row, RawSample)]
    assert [(row.key, row.image, row.caption) for row in found] == samples
    assert [row.member for row in found] == [f"row {i}" for i in range(70)]


def test_images_that_were_given_as_files_are_in_the_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(0))
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": [str(tmp_path / "a.jpg")], "text": ["x"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    (row,) = read_rows(find_source_files(str(tmp_path / "data"))[0])
    assert isinstance(row, RawSample)
    assert (row.key, row.image, row.caption) == ("a.jpg", picture(0), "x")


def test_each_split_is_a_source_file(tmp_path: Path) -> None:
    splits = {}
    for name, first in (("train", 0), ("test", 5)):
        write_dataset(tmp_path / name, pairs(5, first))
        splits[name] = datasets.load_from_disk(tmp_path / name)
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    files = find_source_files(str(tmp_path / "data"))
    assert [file.name for file in files] == ["train", "test"]
    assert [row.key for file in files for row in read_rows(file)] == [key for key, _, _ in pairs(10)]


def test_a_dataset_that_is_loaded_by_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "data", pairs(5))
    splits = datasets.DatasetDict(train=datasets.load_from_disk(tmp_path / "data"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: splits[split] if split else splits)
    (file,) = find_source_files("someone/something", format="huggingface")
    assert file.uri == "hf://datasets/someone/something/train"
    assert [row.key for row in read_rows(file)] == [key for key, _, _ in pairs(5)]


def test_without_network_a_name_is_an_error_that_names_the_remedy() -> None:
    with pytest.raises(SourceError, match=r"someone/something: .*save_to_disk\(folder\)"):
        find_source_files("someone/something", format="huggingface")


def test_datasets_is_not_imported_for_other_sources(tmp_path: Path) -> None:
    code = "import sys, tasks.curation.ingest; sys.exit('datasets' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
