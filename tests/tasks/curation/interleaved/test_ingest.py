import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import schema
from storage.pool import read_documents
from storage.warehouse import Warehouse
from tasks.curation.interleaved import ingest as module
from tasks.curation.interleaved.ingest import ingest_documents
from tasks.curation.sources.contract import SourceError
from tests.tasks.curation.source_files import picture, write_lines, write_tar

Row = dict[str, Any]


def mmc4(*images: tuple[str, int | None], texts: int = 3, **fields: Any) -> Row:
    infos = [{"image_name": n, "raw_url": f"https://e.org/{n}", "matched_text_index": at, "x": 1} for n, at in images]
    return {"url": "https://e.org/", "text_list": [f"text {at}" for at in range(texts)], "image_info": infos, **fields}


def ingested(warehouse: Warehouse, source: Path, **options: Any) -> list[Row]:
    """Ingest, and return the pool's documents with each image's bytes in place of its id."""
    documents = ingest_documents(str(source), pool="p", warehouse=warehouse, **options).ref
    images = {
        row["sample_id"]: row["image"]["bytes"]
        for shard in documents.images.shards
        for row in warehouse.read_table(shard.path).to_pylist()
    }
    rows = [row for shard in documents.shards for row in warehouse.read_table(shard.path).to_pylist()]
    return [row | {"content": [content(segment, images) for segment in row["segments"]]} for row in rows]


def content(segment: Row, images: dict[str, bytes]) -> Any:
    return segment["text"] if segment["kind"] == "text" else segment["reason"] or images[segment["sample_id"]]


def quarantine(warehouse: Warehouse) -> list[tuple[str, str]]:
    paths = [f"quarantine/p/{name}" for name in warehouse.names("quarantine/p")]
    rows = warehouse.read_tables(paths, schema.QUARANTINE).to_pylist()
    return sorted((row["reason"], row["source"]["member"]) for row in rows)


def write_images(folder: Path, *names: str) -> dict[str, bytes]:
    data = {name: picture(at) for at, name in enumerate(names)}
    for name, image in data.items():
        (folder / name).write_bytes(image)
    return data


# -- MMC4 -----------------------------------------------------------------------------------------------------


def test_images_stand_before_the_text_they_are_matched_to_and_unmatched_ones_last(
    source: Path, warehouse: Warehouse
) -> None:
    data = write_images(source, "a", "b", "c", "d")
    write_lines(source / "x.jsonl", [mmc4(("a", 2), ("b", None), ("c", 0), ("d", 2))])
    (row,) = ingested(warehouse, source)
    assert row["content"] == [data["c"], "text 0", "text 1", data["a"], data["d"], "text 2", data["b"]]
    assert row["key"] == "https://e.org/"
    assert row["source"] == {"path": str(source / "x.jsonl"), "member": "line 1"}


def test_images_are_samples_that_know_their_document_and_place(source: Path, warehouse: Warehouse) -> None:
    write_images(source, "a")
    write_lines(source / "x.jsonl", [mmc4(("a", 1))])
    (row,) = ingested(warehouse, source)
    (shard,) = read_documents(warehouse, "p").images.shards
    table = warehouse.read_table(shard.path)
    assert table.schema.equals(schema.SAMPLES, check_metadata=True)
    (sample,) = table.to_pylist()
    assert sample["key"] == f"{row['document_id']}#1"
    assert sample["caption"] is None
    assert sample["url"] == "https://e.org/a"
    assert json.loads(sample["metadata"]) == {"matched_text_index": 1, "x": 1}
    assert sample["source"]["member"] == "line 1, segment 1"


def test_other_fields_are_metadata_but_for_what_is_measured_here(source: Path, warehouse: Warehouse) -> None:
    write_lines(source / "x.jsonl", [mmc4(similarity_matrix=[[1]], could_have_url_duplicate=0)])
    (row,) = ingested(warehouse, source)
    assert json.loads(row["metadata"]) == {"url": "https://e.org/", "could_have_url_duplicate": 0}


@pytest.mark.parametrize("beside", [True, False])
def test_images_are_read_out_of_a_tar(source: Path, tmp_path: Path, warehouse: Warehouse, beside: bool) -> None:
    archive = source / "x.tar" if beside else tmp_path / "elsewhere.tar"
    data = {"a": picture(1), "b": picture(2)}
    write_tar(archive, [(name, image, "caption") for name, image in data.items()])
    write_lines(source / "x.jsonl", [mmc4(("b.jpg", 0), ("gone.jpg", 1), ("a.jpg", 2))])
    (row,) = ingested(warehouse, source, image_folder=None if beside else str(archive))
    assert row["content"] == [data["b"], "text 0", "missing_file", "text 1", data["a"], "text 2"]


def test_links_in_a_tar_are_not_followed(source: Path, warehouse: Warehouse) -> None:
    (source / "real.jpg").write_bytes(picture(1))
    with tarfile.open(source / "x.tar", "w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, str(source / "real.jpg")
        archive.addfile(link)
    write_lines(source / "x.jsonl", [mmc4(("a.jpg", 0))])
    (row,) = ingested(warehouse, source)
    assert row["content"][0] == "missing_file"


# -- OBELICS --------------------------------------------------------------------------------------------------


def test_parallel_lists_keep_their_order(source: Path, warehouse: Warehouse) -> None:
    one, two = picture(1), picture(2)
    images = [{"bytes": one, "path": "1.jpg"}, None, {"bytes": two, "path": None}, None, None]
    table = {
        "images": [images],
        "texts": [[None, "first", None, "second", None]],
        "metadata": [json.dumps([{"alt_text": "x"}, None, None, None, None])],
        "general_metadata": [json.dumps({"url": "https://e.org/page"})],
    }
    pq.write_table(pa.table(table), source / "x.parquet")
    (row,) = ingested(warehouse, source)
    assert row["content"] == [one, "first", two, "second", "missing_image"]
    assert row["key"] == "https://e.org/page"
    (shard,) = read_documents(warehouse, "p").images.shards
    assert json.loads(warehouse.read_table(shard.path)["metadata"][0].as_py()) == {"alt_text": "x"}


def test_images_may_be_bytes_or_paths_and_addresses_are_never_fetched(source: Path, warehouse: Warehouse) -> None:
    data = write_images(source, "a.png")
    write_lines(source / "x.jsonl", [{"images": ["a.png", None, "https://e.org/b.png"], "texts": [None, "t", None]}])
    pq.write_table(pa.table({"images": [[data["a.png"], None]], "texts": [[None, "t"]]}), source / "y.parquet")
    by_path, by_bytes = sorted(ingested(warehouse, source), key=lambda row: -len(row["segments"]))
    assert by_path["content"] == [data["a.png"], "t", "missing_image"]
    assert by_path["segments"][2]["url"] == "https://e.org/b.png"
    assert by_bytes["content"] == [data["a.png"], "t"]


# -- what can't be read ---------------------------------------------------------------------------------------


def test_a_missing_or_broken_image_is_marked_where_it_stood_and_quarantined(source: Path, warehouse: Warehouse) -> None:
    data = write_images(source, "a", "b")
    (source / "b").write_bytes(data["b"][:-200])
    (source / "c").write_bytes(b"<html>")
    write_lines(source / "x.jsonl", [mmc4(("a", 0), ("b", 1), ("c", 2), ("../d", 2), ("e", None))])
    (row,) = ingested(warehouse, source)
    reasons = ["truncated", "not_an_image", "outside_source", "missing_file"]
    assert row["content"] == [data["a"], "text 0", reasons[0], "text 1", *reasons[1:3], "text 2", reasons[3]]
    assert [reason for reason, _ in quarantine(warehouse)] == sorted(reasons)
    assert {row["reason"] is None for row in row["segments"] if row["sample_id"] or row["text"]} == {True}


@pytest.mark.parametrize(
    "line",
    [
        '{"text_list": ["a"]}',
        '{"text_list": "a", "image_info": []}',
        '{"text_list": [1], "image_info": []}',
        '{"text_list": [], "image_info": []}',
        '{"text_list": ["a"], "image_info": ["b"]}',
        '{"texts": ["a"], "images": []}',
        '{"texts": ["a"], "images": [5]}',
        '{"texts": [null], "images": [{"path": 5}]}',
        '{"text_list": ["a"], "image_info": [{"image_name": ["b"]}]}',
        '{"texts": ["a", [1]], "images": [null, null]}',
        json.dumps({"text_list": ["a"] * 5000, "image_info": []}),
        '{"caption": "a"}',
        '{"texts": ["\\ud800"], "images": [null]}',
    ],
)
def test_what_is_no_document_is_quarantined_and_the_next_read(source: Path, warehouse: Warehouse, line: str) -> None:
    (source / "x.jsonl").write_text(line + "\n" + json.dumps(mmc4()) + "\n[1]\nnonsense\n")
    (row,) = ingested(warehouse, source)
    assert row["content"] == ["text 0", "text 1", "text 2"]
    assert quarantine(warehouse) == [("bad_document", "line 1"), ("bad_json", "line 3"), ("bad_json", "line 4")]


def test_a_parquet_file_that_breaks_off_is_one_fault(source: Path, warehouse: Warehouse) -> None:
    pq.write_table(pa.table({"images": [[None]], "texts": [["t"]]}), source / "x.parquet")
    (source / "x.parquet").write_bytes((source / "x.parquet").read_bytes()[:-30])
    assert ingested(warehouse, source) == []
    assert quarantine(warehouse) == [("broken_archive", "row 0")]


def test_a_source_without_documents_says_what_would_be(source: Path, warehouse: Warehouse) -> None:
    write_tar(source / "a.tar", [("a", picture(1), "c")])
    with pytest.raises(SourceError, match=r"found no documents\. Expected \.jsonl or \.parquet"):
        ingest_documents(str(source), pool="p", warehouse=warehouse)


# -- again ----------------------------------------------------------------------------------------------------


def test_an_unchanged_source_is_not_read_again_and_new_documents_are_added(
    source: Path, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(source, "a", "b")
    lines = [mmc4(("a", 0), url=f"https://e.org/{at}") for at in range(5)]
    write_lines(source / "x.jsonl", lines)
    before = ingest_documents(str(source), pool="p", warehouse=warehouse, shard_documents=2)
    assert (before.cached, sorted(shard.rows for shard in before.ref.shards)) == (False, [1, 2, 2])
    with monkeypatch.context() as patch:
        patch.setattr(module.sources, "read_documents", lambda _: pytest.fail("read again"))
        assert ingest_documents(str(source), pool="p", warehouse=warehouse, shard_documents=2).cached
    write_lines(source / "x.jsonl", [*lines, mmc4(("b", 1), url="https://e.org/new")])
    after = ingest_documents(str(source), pool="p", warehouse=warehouse, shard_documents=2).ref
    assert set(before.ref.shards) < set(after.shards)
    assert (after.rows, after.images.rows) == (6, 6)


def test_the_same_source_makes_the_same_objects_after_a_kill_at_any_write(source: Path, tmp_path: Path) -> None:
    write_images(source, "a", "b")
    write_lines(source / "x.jsonl", [mmc4(("a", 0), ("b", 1), url=f"https://e.org/{at}") for at in range(4)])
    whole = Warehouse(str(tmp_path / "whole"))
    ingest_documents(str(source), pool="p", warehouse=whole, shard_documents=2)
    expected = objects(whole)
    for survivors in range(len(expected)):
        torn = Warehouse(str(tmp_path / f"torn{survivors}"))
        shutil.copytree(whole.root, torn.root)
        shutil.rmtree(torn.local_path("ledgers"))
        written = sorted(expected, key=lambda path: (path.split("/")[0] == "documents", path))
        for path in written[survivors:]:
            torn.local_path(path).unlink()
        ingest_documents(str(source), pool="p", warehouse=torn, shard_documents=2)
        assert objects(torn) == expected


def objects(warehouse: Warehouse) -> dict[str, str]:
    root = Path(warehouse.root)
    files = [path for folder in ("pools", "documents") for path in (root / folder).rglob("*.parquet")]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_image_that_has_come_makes_another_version_of_its_document(source: Path, warehouse: Warehouse) -> None:
    write_lines(source / "x.jsonl", [mmc4(("a", 0))])
    (before,) = ingested(warehouse, source)
    assert ingest_documents(str(source), pool="p", warehouse=warehouse).cached
    write_images(source, "a")
    versions = ingested(warehouse, source)
    assert {row["key"] for row in versions} == {before["key"]}
    assert sorted(row["content"][0] == "missing_file" for row in versions) == [False, True]
