import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage import schema
from storage.pool import read_pool
from storage.refs import Outcome, PoolRef
from storage.warehouse import Warehouse, WarehouseError
from tasks.curation import ingest as module
from tasks.curation.ingest import IngestedFile, find_source_files, ingest, ingest_file
from tasks.curation.pool_writer import sample_id
from tasks.curation.quarantine import quarantine_reasons
from tasks.curation.sources.contract import Reason, SourceError
from tests.tasks.curation.source_files import (
    Pair,
    member,
    pairs,
    picture,
    write_dataset,
    write_folder,
    write_jsonl,
    write_lines,
    write_members,
    write_parquet,
    write_tar,
)

WRITERS: dict[str, Callable[..., Path]] = {
    "a.tar": write_tar,
    "a.parquet": write_parquet,
    "a.jsonl": write_jsonl,
    "folder": write_folder,
    "dataset": write_dataset,
}


def samples(warehouse: Warehouse, pool: str = "p") -> list[dict[str, Any]]:
    paths = [shard.path for shard in read_pool(warehouse, pool).shards]
    rows: list[dict[str, Any]] = warehouse.read_tables(paths, schema.SAMPLES).to_pylist()
    return sorted(rows, key=lambda row: (row["source"]["path"], row["key"]))


def quarantine(warehouse: Warehouse, pool: str = "p") -> list[dict[str, Any]]:
    paths = [f"quarantine/{pool}/{name}" for name in warehouse.names(f"quarantine/{pool}")]
    rows: list[dict[str, Any]] = warehouse.read_tables(paths, schema.QUARANTINE).to_pylist()
    return sorted(rows, key=lambda row: (row["key"] or "", row["source"]["member"]))


def objects(warehouse: Warehouse) -> dict[str, bytes]:
    """All a warehouse holds of pools and quarantine, by path."""
    root = Path(warehouse.root)
    return {
        str(file.relative_to(root)): file.read_bytes()
        for folder in ("pools", "quarantine")
        for file in sorted((root / folder).rglob("*.parquet"))
    }


def forget(warehouse: Warehouse) -> None:
    shutil.rmtree(warehouse.local_path("ledgers"))


# -- what is stored -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_of_every_format_the_image_is_stored_as_it_was(source: Path, warehouse: Warehouse, name: str) -> None:
    expected = pairs(40)
    WRITERS[name](source / name, expected)
    outcome = ingest(str(source / name), pool="p", warehouse=warehouse)
    stored = samples(warehouse)
    assert not outcome.cached
    assert outcome.ref.rows == 40
    assert [(row["key"], row["image"]["bytes"], row["caption"]) for row in stored] == expected
    assert {row["source"]["path"] for row in stored} == {str(source / name)}
    assert not quarantine(warehouse)


def test_a_shard_has_the_schema_and_the_order_of_the_source(source: Path, warehouse: Warehouse) -> None:
    write_tar(source / "a.tar", pairs(30)[::-1])
    (shard,) = ingest(str(source), pool="p", warehouse=warehouse).ref.shards
    table = warehouse.read_table(shard.path)
    assert table.schema.equals(schema.SAMPLES, check_metadata=True)
    assert table["key"].to_pylist() == [key for key, _, _ in pairs(30)[::-1]]
    row = table.to_pylist()[0]
    assert row["url"] == "https://example.org/000000029"
    assert row["source"] == {"path": str(source / "a.tar"), "member": "000000029.jpg"}
    assert row["image"]["path"] == "000000029.jpg"
    assert json.loads(row["metadata"]) == {"width": 24, "status": "success"}


def test_a_sample_id_is_a_hash_over_key_bytes_and_caption_each_after_its_length() -> None:
    def part(data: bytes) -> bytes:
        return len(data).to_bytes(8, "big") + data

    expected = hashlib.sha256(part("ké".encode()) + part(b"\xff\xd8") + part(b"a cat")).hexdigest()[:32]
    assert sample_id("ké", b"\xff\xd8", "a cat") == expected
    assert sample_id("ab", b"c", "") != sample_id("a", b"bc", "")


def test_without_keys_the_image_is_the_key_so_that_order_and_file_names_do_not_matter(
    source: Path, warehouse: Warehouse
) -> None:
    for name, images in (("a", [picture(0), picture(1)]), ("b", [picture(2), picture(1), picture(0)])):
        pq.write_table(pa.table({"jpg": images, "caption": ["x"] * len(images)}), source / f"{name}.parquet")
        ingest(str(source / f"{name}.parquet"), pool="p", warehouse=warehouse)
    assert sorted(row["key"] for row in samples(warehouse)) == sorted(
        hashlib.sha256(picture(i)).hexdigest()[:16] for i in range(3)
    )


CAPTIONS = [
    "שלום עולם",
    "قطة على السجادة",
    "👩‍👩‍👧 family 🏳️‍🌈",
    "nul \0 inside",
    "line\nbreak\r\n",
    " \u202eright to left ",
    "e\u0301",
]


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.jsonl", "dataset"])
def test_captions_are_stored_as_they_came(source: Path, warehouse: Warehouse, name: str) -> None:
    WRITERS[name](source / name, [(str(i), picture(i), caption) for i, caption in enumerate(CAPTIONS)])
    ingest(str(source / name), pool="p", warehouse=warehouse)
    assert [row["caption"] for row in samples(warehouse)] == CAPTIONS


@settings(max_examples=25, deadline=None)
@given(caption=st.text(min_size=1).filter(lambda text: not text.isspace()), note=st.text() | st.floats())
def test_any_caption_and_field_can_be_stored(
    tmp_path_factory: pytest.TempPathFactory, caption: str, note: str | float
) -> None:
    folder = tmp_path_factory.mktemp("any")
    fields = json.dumps({"caption": caption, "note": note}).encode()
    write_members(folder / "a.tar", [member("a.jpg", picture(0)), member("a.json", fields)])
    warehouse = Warehouse(str(folder / "warehouse"))
    ingest(str(folder / "a.tar"), pool="p", warehouse=warehouse)
    (row,) = samples(warehouse)
    expected = None if isinstance(note, float) and not abs(note) < float("inf") else note
    assert (row["caption"], json.loads(row["metadata"])) == (caption, {"note": expected})


def test_names_that_are_not_utf8_are_stored_readably(source: Path, warehouse: Warehouse) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_folder(source / name, [(name, picture(0), "x")])
    (source / name / "dangling.jpg").symlink_to("nowhere.jpg")
    assert not ingest(str(source), pool="folder", warehouse=warehouse).cached
    assert ingest(str(source), pool="folder", warehouse=warehouse).cached
    assert [row["key"] for row in samples(warehouse, "folder")] == [r"caf\udce9/caf\udce9"]
    assert [row["reason"] for row in quarantine(warehouse, "folder")] == ["missing_file"]
    write_members(source / "a.tar", [member(f"{name}.jpg", picture(0)), member(f"{name}.txt", b"x")])
    ingest(str(source), pool="p", warehouse=warehouse)
    (row,) = samples(warehouse)
    assert (row["key"], row["source"]["member"]) == (r"caf\udce9", r"caf\udce9.jpg")


# -- quarantine -----------------------------------------------------------------------------------------------


def bomb() -> bytes:
    data = bytearray(picture(0, "PNG"))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def write_faults(source: Path) -> dict[str, Reason]:
    """Write a source with one row for every reason; returns the reason of each key."""
    png = bytearray(picture(0, "PNG"))
    png[len(png) // 2] ^= 0xFF
    good, text = picture(0), b"x"
    members: dict[str, tuple[Reason, list[tuple[str, bytes]]]] = {
        "bad-json": (Reason.BAD_JSON, [("jpg", good), ("txt", text), ("json", b"{")]),
        "list": (Reason.CAPTION_NOT_TEXT, [("jpg", good), ("json", b'{"caption": ["x"]}')]),
        "latin": (Reason.CAPTION_NOT_UTF8, [("jpg", good), ("txt", b"caf\xe9")]),
        "corrupt": (Reason.CORRUPT, [("png", bytes(png)), ("txt", text)]),
        "bomb": (Reason.DECOMPRESSION_BOMB, [("png", bomb()), ("txt", text)]),
        "empty": (Reason.EMPTY, [("jpg", b""), ("txt", text)]),
        "extra": (Reason.EXTRA_IMAGE, [("jpg", good), ("png", picture(1, "PNG")), ("txt", text)]),
        "blank": (Reason.MISSING_CAPTION, [("jpg", good), ("txt", b" \n")]),
        "no-image": (Reason.MISSING_IMAGE, [("txt", text)]),
        "html": (Reason.NOT_AN_IMAGE, [("jpg", b"<html>"), ("txt", text)]),
        "cut": (Reason.TRUNCATED, [("jpg", good[:-100]), ("txt", text)]),
    }
    link = member("link.jpg", type=b"2", linkname="/etc/passwd")
    write_members(source / "a.tar", [*(member(f"{k}.{s}", d) for k, (_, f) in members.items() for s, d in f), link])
    broken = write_tar(source / "b.tar", [("broken", good, "x")])
    broken.write_bytes(broken.read_bytes().rstrip(b"\0"))
    write_parquet(source / "c.parquet", [("failed", None, "x")], status=["failed_to_download"])
    with (source / "large.jpg").open("wb") as file:
        file.truncate(2**28 + 1)
    lines = [("missing", "nothing.jpg"), ("outside", "../x.jpg"), ("large", "large.jpg")]
    write_lines(source / "d.jsonl", [{"key": key, "image_path": path, "caption": "x"} for key, path in lines])
    return {key: reason for key, (reason, _) in members.items()} | {
        "link": Reason.NOT_A_FILE,
        "": Reason.BROKEN_ARCHIVE,
        "failed": Reason.DOWNLOAD_FAILED,
        "missing": Reason.MISSING_FILE,
        "outside": Reason.OUTSIDE_SOURCE,
        "large": Reason.TOO_LARGE,
    }


def test_every_fault_is_in_quarantine_with_its_reason_and_the_rest_in_the_pool(
    source: Path, warehouse: Warehouse
) -> None:
    expected = write_faults(source)
    ingest(str(source), pool="p", warehouse=warehouse)
    rows = quarantine(warehouse)
    assert {row["key"] or "": row["reason"] for row in rows} == {key: str(reason) for key, reason in expected.items()}
    of_samples = set(Reason) - {Reason.BAD_DOCUMENT}
    assert {row["reason"] for row in rows} == {str(reason) for reason in of_samples}
    assert len(rows) == len(expected)
    assert [row["key"] for row in samples(warehouse)] == ["extra", "broken"]


def test_a_quarantined_row_tells_where_it_was_and_what_its_bytes_were(source: Path, warehouse: Warehouse) -> None:
    write_faults(source)
    ingest(str(source), pool="p", warehouse=warehouse)
    rows = {row["key"]: row for row in quarantine(warehouse)}
    cut = picture(0)[:-100]
    assert rows["cut"]["source"] == {"path": str(source / "a.tar"), "member": "cut.jpg"}
    assert (rows["cut"]["digest"], rows["cut"]["size"]) == (hashlib.sha256(cut).hexdigest(), len(cut))
    assert "truncated" in rows["cut"]["detail"]
    assert (rows["missing"]["digest"], rows["missing"]["size"]) == (None, None)
    assert len({row["quarantine_id"] for row in rows.values()}) == len(rows)
    assert all(row["detail"] for row in rows.values())


def test_quarantine_is_not_filled_twice(source: Path, warehouse: Warehouse) -> None:
    write_faults(source)
    ingest(str(source), pool="p", warehouse=warehouse)
    before = objects(warehouse)
    forget(warehouse)
    assert not ingest(str(source), pool="p", warehouse=warehouse).cached
    assert objects(warehouse) == before


def test_a_file_counts_what_became_of_its_rows(source: Path, warehouse: Warehouse) -> None:
    write_faults(source)
    write_tar(source / "e.tar", [("extra", picture(0), "x"), *pairs(3)])
    counted = {}
    for file in find_source_files(str(source)):
        done = ingest_file(file, pool="p", warehouse=warehouse).ref
        counted[file.name] = (done.samples, done.known, done.quarantined)
    assert counted == {
        "a.tar": (1, 0, 12),
        "b.tar": (1, 0, 1),
        "c.parquet": (0, 0, 1),
        "d.jsonl": (0, 0, 3),
        "e.tar": (3, 1, 0),
    }


# -- again, and more ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_source_again_adds_nothing(source: Path, warehouse: Warehouse, name: str) -> None:
    WRITERS[name](source / name, pairs(10))
    first = ingest(str(source / name), pool="p", warehouse=warehouse)
    before = objects(warehouse)
    assert ingest(str(source / name), pool="p", warehouse=warehouse) == Outcome(first.ref, cached=True)
    forget(warehouse)
    assert ingest(str(source / name), pool="p", warehouse=warehouse) == Outcome(first.ref, cached=False)
    assert objects(warehouse) == before


def test_an_unchanged_file_is_not_opened_again(
    source: Path, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(source / "a.tar", pairs(3))
    ingest(str(source), pool="p", warehouse=warehouse)
    write_tar(source / "b.tar", pairs(3, 3))
    read: list[str] = []
    read_rows = module.read_rows
    monkeypatch.setattr(module, "read_rows", lambda file: (read.append(file.name), read_rows(file))[1])
    ingest(str(source), pool="p", warehouse=warehouse)
    assert read == ["b.tar"]


def test_a_file_whose_version_can_not_be_told_is_read_again(source: Path, warehouse: Warehouse) -> None:
    write_tar(source / "a.tar", pairs(3))
    file = replace(find_source_files(str(source))[0], version="")
    done = [ingest_file(file, pool="p", warehouse=warehouse) for _ in range(2)]
    assert [(outcome.cached, outcome.ref.samples, outcome.ref.known) for outcome in done] == [
        (False, 3, 0),
        (False, 0, 3),
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_of_a_grown_source_only_the_new_samples_are_added(source: Path, warehouse: Warehouse, name: str) -> None:
    WRITERS[name](source / name, pairs(10))
    before = set(ingest(str(source / name), pool="p", warehouse=warehouse, shard_samples=4).ref.shards)
    kept = objects(warehouse)
    if name == "dataset":
        shutil.rmtree(source / name)
    WRITERS[name](source / name, pairs(17))
    after = ingest(str(source / name), pool="p", warehouse=warehouse, shard_samples=4).ref.shards
    assert [(row["key"], row["image"]["bytes"], row["caption"]) for row in samples(warehouse)] == pairs(17)
    assert [shard.rows for shard in sorted(before, key=lambda s: s.rows)] == [2, 4, 4]
    assert sorted(shard.rows for shard in set(after) - before) == [1, 2, 4]
    assert kept.items() <= objects(warehouse).items()


def test_a_new_file_in_a_source_adds_its_samples(source: Path, warehouse: Warehouse) -> None:
    write_tar(source / "b.tar", pairs(5))
    ingest(str(source), pool="p", warehouse=warehouse)
    write_tar(source / "a.tar", pairs(8))
    assert ingest(str(source), pool="p", warehouse=warehouse).ref.rows == 8


def test_the_same_key_with_other_content_is_another_sample_and_the_same_content_is_not(
    source: Path, warehouse: Warehouse
) -> None:
    rows: list[Pair] = [("k", picture(0), "x"), ("k", picture(1), "x"), ("k", picture(0), "y"), ("k", picture(0), "x")]
    write_parquet(source / "a.parquet", [*rows, ("other", picture(0), "x")])
    ingest(str(source), pool="p", warehouse=warehouse)
    stored = sorted((row["key"], row["image"]["bytes"], row["caption"]) for row in samples(warehouse))
    assert stored == sorted([*rows[:3], ("other", picture(0), "x")])


def test_a_folder_or_a_pipe_in_an_images_place_is_not_taken_for_one_that_came_later(
    source: Path, warehouse: Warehouse
) -> None:
    (source / "folder.jpg").mkdir()
    os.mkfifo(source / "pipe.jpg")
    lines = [{"key": name, "image_path": f"{name}.jpg", "caption": "x"} for name in ("folder", "pipe", "nothing")]
    file = find_source_files(str(write_lines(source / "a.jsonl", lines)))[0]
    assert [ingest_file(file, pool="p", warehouse=warehouse).cached for _ in range(3)] == [False, True, True]


def test_an_image_file_that_comes_later_is_added_then(source: Path, warehouse: Warehouse) -> None:
    write_jsonl(source / "a.jsonl", pairs(3))
    for name in ("000000001", "000000002"):
        (source / "images" / f"{name}.jpg").rename(source / f"{name}.later")
    assert ingest(str(source), pool="p", warehouse=warehouse).ref.rows == 1
    assert ingest(str(source), pool="p", warehouse=warehouse).cached
    (source / "000000001.later").rename(source / "images" / "000000001.jpg")
    assert ingest(str(source), pool="p", warehouse=warehouse).ref.rows == 2
    assert ingest(str(source), pool="p", warehouse=warehouse).cached
    (source / "000000002.later").rename(source / "images" / "000000002.jpg")
    assert ingest(str(source), pool="p", warehouse=warehouse).ref.rows == 3
    assert ingest(str(source), pool="p", warehouse=warehouse).cached


def test_a_deleted_shard_is_made_again(source: Path, warehouse: Warehouse) -> None:
    write_tar(source / "a.tar", pairs(10))
    shards = ingest(str(source), pool="p", warehouse=warehouse, shard_samples=4).ref.shards
    before = objects(warehouse)
    warehouse.local_path(shards[0].path).unlink()
    assert not ingest(str(source), pool="p", warehouse=warehouse, shard_samples=4).cached
    assert objects(warehouse) == before


def test_the_same_source_makes_the_same_objects_in_any_warehouse(source: Path, tmp_path: Path) -> None:
    write_faults(source)
    write_tar(source / "e.tar", pairs(20))
    made = []
    for name in ("one", "two"):
        ingest(str(source), pool="p", warehouse=Warehouse(str(tmp_path / name)), shard_samples=7)
        made.append(objects(Warehouse(str(tmp_path / name))))
    assert made[0] == made[1]


def test_a_shard_ends_at_its_samples_or_bytes_and_never_spans_two_files(
    source: Path, warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(0)
    write_parquet(source / "a.parquet", [(str(i), image, "x") for i in range(10)])
    write_parquet(source / "b.parquet", [(str(i), image, "x") for i in range(10, 13)])
    assert rows_of(ingest(str(source), pool="p", warehouse=warehouse, shard_samples=8)) == [2, 3, 8]
    monkeypatch.setattr(module, "SHARD_BYTES", 4 * len(image))
    assert rows_of(ingest(str(source), pool="q", warehouse=warehouse)) == [2, 3, 4, 4]


def rows_of(outcome: Outcome[PoolRef]) -> list[int]:
    return sorted(shard.rows for shard in outcome.ref.shards)


def test_files_ingested_at_once_never_add_a_sample_twice(source: Path, warehouse: Warehouse) -> None:
    for i in range(6):
        write_parquet(source / f"{i}.parquet", [*pairs(20), *pairs(5, 100 + 5 * i)])
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda file: ingest_file(file, pool="p", warehouse=warehouse), find_source_files(str(source))))
    assert sorted(row["key"] for row in samples(warehouse)) == sorted(key for key, _, _ in pairs(20) + pairs(30, 100))


# -- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["", "../x", "A", "a/b"])
def test_a_pool_name_that_leads_elsewhere_is_refused(source: Path, warehouse: Warehouse, pool: str) -> None:
    write_tar(source / "a.tar", pairs(1))
    with pytest.raises(WarehouseError, match="pool name"):
        ingest(str(source), pool=pool, warehouse=warehouse)
    with pytest.raises(WarehouseError, match="pool name"):
        ingest_file(find_source_files(str(source))[0], pool=pool, warehouse=warehouse)


def test_a_source_that_is_not_there_is_refused(source: Path, warehouse: Warehouse) -> None:
    with pytest.raises(SourceError, match="no such file or folder"):
        ingest(str(source / "nothing"), pool="p", warehouse=warehouse)


# -- killed ---------------------------------------------------------------------------------------------------

KILLED_AFTER = """
import os, signal, sys
from storage.warehouse import Warehouse
from tasks.curation.ingest import ingest
left = int(sys.argv[3])
publish = Warehouse._publish
def killing(self, temporary, path):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return publish(self, temporary, path)
Warehouse._publish = killing
ingest(sys.argv[1], pool="p", warehouse=Warehouse(sys.argv[2]), shard_samples=7)
"""


def run(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])


def write_mixed(source: Path) -> None:
    write_faults(source)
    write_tar(source / "e.tar", pairs(30))
    write_jsonl(source / "f.jsonl", pairs(25, 15))


def test_after_a_kill_at_any_object_the_next_run_makes_what_an_undisturbed_one_does(
    source: Path, tmp_path: Path
) -> None:
    write_mixed(source)
    undisturbed = Warehouse(str(tmp_path / "undisturbed"))
    ingest(str(source), pool="p", warehouse=undisturbed, shard_samples=7)
    for killed_after in (0, 1, 4, 8, 13):
        warehouse = Warehouse(str(tmp_path / f"killed-{killed_after}"))
        assert run(KILLED_AFTER, source, warehouse.root, killed_after).wait() == -signal.SIGKILL
        assert objects(warehouse).items() <= objects(undisturbed).items()
        ingest(str(source), pool="p", warehouse=warehouse, shard_samples=7)
        assert objects(warehouse) == objects(undisturbed)
        assert ingest(str(source), pool="p", warehouse=warehouse, shard_samples=7).cached


def test_after_kills_at_random_moments_the_next_run_makes_what_an_undisturbed_one_does(
    source: Path, tmp_path: Path
) -> None:
    write_mixed(source)
    undisturbed, warehouse = Warehouse(str(tmp_path / "undisturbed")), Warehouse(str(tmp_path / "killed"))
    ingest(str(source), pool="p", warehouse=undisturbed, shard_samples=7)
    for _ in range(3):
        child = run(KILLED_AFTER, source, warehouse.root, 10**6)
        while not (Path(warehouse.root) / ".temporary").exists() and child.poll() is None:
            time.sleep(0.004)
        time.sleep(random.uniform(0, 0.3))
        child.kill()
        child.wait()
        assert objects(warehouse).items() <= objects(undisturbed).items()
    ingest(str(source), pool="p", warehouse=warehouse, shard_samples=7)
    assert objects(warehouse) == objects(undisturbed)


def test_what_became_of_a_file_can_be_logged_whatever_its_name_is() -> None:
    said = str(IngestedFile("/data/\udcff.tar", (), samples=3, known=2, quarantined=1))
    assert said.encode().startswith(rb"\udcff.tar: 3 new samples, 2 known, 1 in quarantine")


# -- memory ---------------------------------------------------------------------------------------------------

GROWTH_MIB = """
import re, sys, threading, time
from pathlib import Path
from storage.warehouse import Warehouse
from tasks.curation import ingest as module
module.SHARD_BYTES = 2 * 2**20
seen = [0]
def watch():
    while True:
        seen[0] = max(seen[0], int(re.search(r"RssAnon:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
        time.sleep(0.004)
threading.Thread(target=watch, daemon=True).start()
def peak_mib(source, pool, rows):
    assert module.ingest(source, pool=pool, warehouse=Warehouse(sys.argv[1])).ref.rows == rows
    return seen[0] / 1024
print(-peak_mib(sys.argv[2], "warm", 60) + peak_mib(sys.argv[3], "p", 520))
"""


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.parquet", "a.jsonl", "dataset"])
def test_memory_does_not_grow_with_the_source(source: Path, tmp_path: Path, name: str) -> None:
    noise = random.Random(0).randbytes(2**17)
    bulky = [(key, image + noise, caption) for key, image, caption in pairs(520)]
    paths = []
    for count in (60, 520):
        (source / str(count)).mkdir()
        paths.append(source / str(count) / name)
        WRITERS[name.removesuffix(".gz")](paths[-1], bulky[:count])
        if name == "a.parquet":  # one row group of many pages
            pq.write_table(pq.read_table(paths[-1]), paths[-1], write_batch_size=8)
        if name == "a.tar.gz":
            paths[-1].write_bytes(gzip.compress(paths[-1].read_bytes(), 0))
    child = subprocess.run(
        [sys.executable, "-c", GROWTH_MIB, tmp_path / "warehouse", *paths], check=True, capture_output=True, text=True
    )
    assert float(child.stdout) < 30  # 65 MiB are read, 57 more than before


def test_reasons_in_quarantine_are_counted(tmp_path: Path) -> None:
    warehouse = Warehouse(str(tmp_path / "warehouse"))
    (tmp_path / "source").mkdir()
    for name, data in {"a": b"", "b": b"text", "c": b"words"}.items():
        (tmp_path / "source" / f"{name}.jpg").write_bytes(data)
        (tmp_path / "source" / f"{name}.txt").write_text("a caption")
    ingest(str(tmp_path / "source"), pool="pets", warehouse=warehouse)
    shutil.copytree(tmp_path / "source", tmp_path / "copy")
    ingest(str(tmp_path / "copy"), pool="pets", warehouse=warehouse)
    assert quarantine_reasons(warehouse, "pets") == "not_an_image (2), empty (1)"
    assert quarantine_reasons(warehouse, "cats") == ""
