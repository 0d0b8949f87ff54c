"""Ingest from and into object storage, against a server that speaks S3."""

from pathlib import Path
from typing import Any

import pytest
import s3fs

from storage import schema
from storage.pool import read_pool
from storage.warehouse import Warehouse
from tasks.curation.ingest import ingest
from tests.tasks.curation.source_files import (
    pairs,
    write_dataset,
    write_folder,
    write_jsonl,
    write_parquet,
    write_tar,
)


def elsewhere() -> s3fs.S3FileSystem:
    """A client that shares nothing with ours, like that of another machine."""
    return s3fs.S3FileSystem(skip_instance_cache=True)


def upload(local: Path, bucket: str) -> str:
    elsewhere().put(str(local), f"{bucket}/source", recursive=True)
    return f"s3://{bucket}/source"


def stored(warehouse: Warehouse) -> list[dict[str, Any]]:
    paths = [shard.path for shard in read_pool(warehouse, "p").shards]
    rows: list[dict[str, Any]] = warehouse.read_tables(paths, schema.SAMPLES).to_pylist()
    return sorted(rows, key=lambda row: row["key"])


WRITERS = {
    "a.tar": write_tar,
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "folder": write_folder,
    "dataset": write_dataset,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_from_a_bucket(tmp_path: Path, bucket: str, name: str) -> None:
    (tmp_path / "source").mkdir()
    WRITERS[name](tmp_path / "source" / name, pairs(12))
    url = upload(tmp_path / "source", bucket)
    warehouse = Warehouse(str(tmp_path / "warehouse"))
    source = url if name.startswith("a.") else f"{url}/{name}"
    ingest(source, pool="p", warehouse=warehouse)
    assert [(row["key"], row["image"]["bytes"], row["caption"]) for row in stored(warehouse)] == pairs(12)
    assert {row["source"]["path"] for row in stored(warehouse)} == {f"{url}/{name}"}
    assert ingest(source, pool="p", warehouse=warehouse).cached
    assert not warehouse.names("quarantine")


def test_the_same_objects_are_made_in_a_bucket_as_on_disk(tmp_path: Path, bucket: str) -> None:
    (tmp_path / "source").mkdir()
    write_tar(tmp_path / "source" / "a.tar", pairs(12))
    write_parquet(tmp_path / "source" / "b.parquet", [("bad", b"?", "x"), *pairs(3, 12)])
    made = []
    for warehouse in (Warehouse(str(tmp_path / "warehouse")), Warehouse(f"s3://{bucket}/tamis")):
        ingest(str(tmp_path / "source"), pool="p", warehouse=warehouse, shard_samples=5)
        assert ingest(str(tmp_path / "source"), pool="p", warehouse=warehouse, shard_samples=5).cached
        folders = ("pools/p", "quarantine/p")
        paths = [f"{folder}/{name}" for folder in folders for name in warehouse.names(folder)]
        made.append({path: warehouse.read_bytes(path) for path in paths})
    assert made[0] == made[1]
    assert len(made[0]) == 5


def test_a_grown_source_adds_only_its_new_samples_to_a_bucket(tmp_path: Path, bucket: str) -> None:
    warehouse = Warehouse(f"s3://{bucket}/tamis")
    for count in (5, 8):
        (tmp_path / str(count)).mkdir()
        write_tar(tmp_path / str(count) / "a.tar", pairs(count))
        elsewhere().put(str(tmp_path / str(count) / "a.tar"), f"{bucket}/source/a.tar")
        ingest(f"s3://{bucket}/source/*.tar", pool="p", warehouse=warehouse)
    assert [row["key"] for row in stored(warehouse)] == [key for key, _, _ in pairs(8)]
    assert sorted(shard.rows for shard in read_pool(warehouse, "p").shards) == [3, 5]


def test_an_image_that_is_not_in_the_bucket_is_a_missing_file_until_it_is(tmp_path: Path, bucket: str) -> None:
    (tmp_path / "source").mkdir()
    write_jsonl(tmp_path / "source" / "a.jsonl", pairs(3))
    url = upload(tmp_path / "source", bucket)
    path, warehouse = f"{bucket}/source/images/{pairs(1)[0][0]}.jpg", Warehouse(str(tmp_path / "warehouse"))
    elsewhere().rm(path)
    assert ingest(f"{url}/a.jsonl", pool="p", warehouse=warehouse).ref.rows == 2
    assert ingest(f"{url}/a.jsonl", pool="p", warehouse=warehouse).cached
    elsewhere().pipe(path, pairs(1)[0][1])
    assert ingest(f"{url}/a.jsonl", pool="p", warehouse=warehouse).ref.rows == 3
