import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import s3fs

from storage.schema import SAMPLES
from storage.warehouse import TEMPORARY, Warehouse, WarehouseError, check_name


def test_what_is_written_reads_back(warehouse: Warehouse) -> None:
    table = pa.table({"sample_id": ["a", "b"], "width": pa.array([1, 2], pa.int32())})
    warehouse.write_table("signals/size/x.parquet", table)
    assert warehouse.exists("signals/size/x.parquet")
    assert warehouse.read_table("signals/size/x.parquet").equals(table)
    assert warehouse.read_table("signals/size/x.parquet", ["width"]).column_names == ["width"]
    assert warehouse.names("signals") == ["size"]
    assert warehouse.names("signals/size") == ["x.parquet"]


def test_all_is_compressed_but_image_files_which_are_and_ids_which_every_query_reads(warehouse: Warehouse) -> None:
    row = {"sample_id": "a", "image": {"bytes": b"\xff\xd8", "path": "a.jpg"}, "caption": "a dog"}
    table = pa.Table.from_pylist([row], SAMPLES)
    warehouse.write_table("pools/p/x.parquet", table)
    with warehouse.open_parquet("pools/p/x.parquet") as parquet:
        group = parquet.metadata.row_group(0)
        found = {group.column(at).path_in_schema: group.column(at).compression for at in range(group.num_columns)}
    assert {column for column, codec in found.items() if codec != "ZSTD"} == {"image.bytes", "sample_id"}
    assert warehouse.read_table("pools/p/x.parquet").equals(table)


def test_what_repeats_nothing_has_no_dictionary_which_would_be_read_whole_for_any_one(warehouse: Warehouse) -> None:
    row = {"sample_id": "a", "image": {"bytes": b"\xff\xd8", "path": "a.jpg"}, "tags": ["a"], "embedding": [0.5, 0.5]}
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = pa.schema(
        {
            "sample_id": pa.string(),
            "image": image,
            "tags": pa.list_(pa.string()),
            "embedding": pa.list_(pa.float32(), 2),
        }
    )
    warehouse.write_table("x.parquet", pa.Table.from_pylist([row, row], columns))
    with warehouse.open_parquet("x.parquet") as parquet:
        group = parquet.metadata.row_group(0)
        leaves = [group.column(at) for at in range(group.num_columns)]
    assert {leaf.path_in_schema: leaf.has_dictionary_page for leaf in leaves} == {
        "sample_id": False,
        "image.bytes": False,
        "image.path": True,
        "tags.list.element": True,
        "embedding.list.element": False,
    }


def test_a_missing_object_is_an_error_and_a_missing_folder_is_empty(warehouse: Warehouse) -> None:
    assert not warehouse.exists("nothing")
    assert warehouse.names("nothing") == []
    with pytest.raises(FileNotFoundError):
        warehouse.read_bytes("nothing")


def test_what_other_processes_write_and_delete_is_seen_at_once(s3_warehouse: Warehouse) -> None:
    elsewhere = s3fs.S3FileSystem(skip_instance_cache=True)
    s3_warehouse.create_bytes("objects/a", b"1")
    assert s3_warehouse.names("objects") == ["a"]
    elsewhere.pipe(s3_warehouse.uri("objects/b"), b"2")
    elsewhere.rm(s3_warehouse.uri("objects/a"))
    assert [s3_warehouse.exists(f"objects/{name}") for name in "ab"] == [False, True]
    assert s3_warehouse.names("objects") == ["b"]


def test_an_object_is_never_overwritten(warehouse: Warehouse) -> None:
    assert warehouse.create_bytes("manifests/1.json", b"first")
    assert not warehouse.create_bytes("manifests/1.json", b"second")
    assert warehouse.read_bytes("manifests/1.json") == b"first"


def test_of_many_writers_at_once_exactly_one_wins(warehouse: Warehouse) -> None:
    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(lambda i: warehouse.create_bytes("manifests/7.json", str(i).encode()), range(8)))
    assert sum(wins) == 1
    assert warehouse.read_bytes("manifests/7.json") == str(wins.index(True)).encode()


def test_an_error_while_building_leaves_nothing(warehouse: Warehouse) -> None:
    with pytest.raises(RuntimeError), warehouse.building("pools/p/x.parquet") as file:
        file.write_bytes(b"half")
        raise RuntimeError
    assert not warehouse.exists("pools/p/x.parquet")
    assert warehouse.names("pools/p") == []


def test_the_same_rows_give_the_same_bytes(warehouse: Warehouse) -> None:
    table = pa.table({"a": list(range(1000)), "b": [str(i) for i in range(1000)]})
    warehouse.write_table("a.parquet", table)
    warehouse.write_table("b.parquet", table)
    assert warehouse.read_bytes("a.parquet") == warehouse.read_bytes("b.parquet")


def test_folders_go_in_and_come_out(warehouse: Warehouse, tmp_path: Path) -> None:
    source = tmp_path / "adapter"
    (source / "inner").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "inner" / "weights").write_bytes(b"123")
    warehouse.create_folder("runs/r/adapter", source)
    with warehouse.downloaded("runs/r/adapter") as local:
        assert (local / "config.json").read_text() == "{}"
        assert (local / "inner" / "weights").read_bytes() == b"123"


def test_a_warehouse_survives_pickling(warehouse: Warehouse) -> None:
    warehouse.create_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(warehouse)).read_bytes("x") == b"1"


def test_only_the_catalog_may_be_replaced(warehouse: Warehouse) -> None:
    warehouse.replace_bytes("catalog.sql", b"1")
    warehouse.replace_bytes("catalog.sql", b"2")
    assert warehouse.read_bytes("catalog.sql") == b"2"


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "", "a\0b"])
def test_paths_stay_inside(tmp_path: Path, path: str) -> None:
    with pytest.raises(WarehouseError):
        Warehouse(str(tmp_path)).create_bytes(path, b"")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "a b", "-a", "a-", "a..b", "x" * 65, "é", "a\n"])
def test_names_that_could_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(WarehouseError, match="pool name"):
        check_name(name, "pool")


@pytest.mark.parametrize("name", ["a", "laion-2b_en.v1", "0", "x" * 64])
def test_plain_names_are_accepted(name: str) -> None:
    assert check_name(name, "pool") == name


def test_stale_temporary_files_are_removed_and_fresh_ones_kept(tmp_path: Path) -> None:
    warehouse = Warehouse(str(tmp_path))
    folder = tmp_path / TEMPORARY
    folder.mkdir()
    for name in ("old", "new"):
        (folder / name).write_text("")
    os.utime(folder / "old", (1, 1))
    assert warehouse.remove_stale() == 1
    assert [p.name for p in folder.iterdir()] == ["new"]


def test_a_writer_killed_at_any_moment_leaves_whole_objects_only(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import sys
        from storage.warehouse import Warehouse
        warehouse = Warehouse(sys.argv[1])
        for i in range(10**6):
            warehouse.create_bytes(f"objects/{i}", str(i).encode() * 100_000)
        """
    )
    for delay in (0.5, 0.55, 0.62):
        root = tmp_path / str(delay)
        child = subprocess.Popen([sys.executable, "-c", script, str(root)])
        while not (root / "objects").exists():
            time.sleep(0.01)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        warehouse = Warehouse(str(root))
        names = warehouse.names("objects")
        assert names
        assert all(warehouse.read_bytes(f"objects/{n}") == n.encode() * 100_000 for n in names)


def test_a_place_that_can_not_be_written_to_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(WarehouseError, match=r"file: can't be written to \(Not a directory\)\. Give a folder of yours"):
        Warehouse(str(tmp_path / "file")).check_writable()
    Warehouse(str(tmp_path / "new")).check_writable()
