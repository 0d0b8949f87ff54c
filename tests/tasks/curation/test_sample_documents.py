import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tasks.curation.sample_documents import FAULTS, JUNK, write_sample_documents


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("shape", ["mmc4", "obelics"])
def test_the_same_seed_writes_the_same_documents(tmp_path: Path, shape: str) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_sample_documents(tmp_path / name, documents=6, seed=seed, shape=shape)  # type: ignore[arg-type]
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")


def test_mmc4_documents_have_the_faults_that_were_planted(tmp_path: Path) -> None:
    planted = write_sample_documents(tmp_path, documents=12)
    rows = list(map(json.loads, (tmp_path / "documents.jsonl").read_text().splitlines()))
    assert [document.fault for document in planted] == [*FAULTS] * 2
    for document, row in zip(planted, rows, strict=True):
        there = [(tmp_path / info["image_name"]).exists() for info in row["image_info"]]
        assert len(there) == len(document.images) == len(set(document.images))
        assert there.count(False) == (document.fault == "missing_image")
        assert (JUNK in row["text_list"]) == (document.fault == "junk_text")
        assert bool(there) == (document.fault != "no_images")
        assert all(0 <= text < len(row["text_list"]) for text in document.images)


def test_in_obelics_shape_each_image_stands_before_its_text(tmp_path: Path) -> None:
    planted = write_sample_documents(tmp_path, documents=12, shape="obelics")
    for document, row in zip(planted, pq.read_table(tmp_path / "documents.parquet").to_pylist(), strict=True):
        numbers = [at for at, text in enumerate(row["texts"]) if text is not None]
        images = [at for at, text in enumerate(row["texts"]) if text is None]
        assert [numbers.index(at + 1) for at in images] == list(document.images)
        assert sum(row["images"][at] is None for at in images) == (document.fault == "missing_image")
        assert json.loads(row["general_metadata"]) == {"url": document.key}
