"""What is trained on and evaluated on, by id, file, pixels or perceptual code."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from storage.refs import SnapshotRef
from storage.schema import CURATED, INTERLEAVED
from storage.snapshot import Draft, FileEntry, commit
from storage.warehouse import Warehouse
from tasks.training.preflight.contamination import check_contamination

HASHES = [("bytes_hash", pa.string()), ("pixels_hash", pa.string()), ("phash", pa.uint64()), ("flat", pa.bool_())]
NOTHING: dict[str, Any] = {"pool": "p", "pool_shards": (), "policy": {}, "signals": {}, "pairs": {}, "counts": {}}


def publish(root: Path, rows: list[dict[str, Any]], schema: pa.Schema, kind: str) -> tuple[SnapshotRef, Warehouse]:
    warehouse = Warehouse(str(root))
    entries = []
    for at, part in enumerate((rows[::2], rows[1::2])):  # two shards: what is shared may lie in either
        path = f"snapshots/d/{kind}/{at}.parquet"
        warehouse.write_table(path, pa.Table.from_pylist(part, schema=schema))
        entries.append(FileEntry(path, len(part), 0, str(at), ""))
    files = {"curated": (), "documents": (), "decisions": (), "published": None, kind: tuple(entries)}
    return commit(warehouse, "d", lambda _: Draft(**NOTHING, **files)).ref, warehouse


def sample(name: str, split: str, data: bytes | None = None, **more: Any) -> dict[str, Any]:
    image = {"bytes": data or name.encode(), "path": name}
    return {"sample_id": name, "key": name, "image": image, "metadata": json.dumps({}), "split": split, **more}


def statuses(root: Path, rows: list[dict[str, Any]], hashes: bool = False) -> dict[str, str]:
    schema = CURATED
    if hashes:
        for name, kind in HASHES:
            schema = schema.append(pa.field(name, kind))
    return {f.subject: f.status for f in check_contamination(*publish(root, rows, schema, "curated"))}


def test_separate_splits_pass(tmp_path: Path) -> None:
    rows = [sample("a", "train"), sample("b", "train"), sample("c", "test"), sample("d", "validation")]
    assert statuses(tmp_path, rows) == {"sample_id": "ok", "image files": "ok"}


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_a_copy_of_a_file_in_an_evaluation_split_fails_by_name(tmp_path: Path, held_out: str) -> None:
    rows = [sample("a", "train", b"same"), sample("b", "train"), sample("c", held_out, b"same")]
    found = {f.subject: f for f in check_contamination(*publish(tmp_path, rows, CURATED, "curated"))}
    assert found["sample_id"].status == "ok"
    assert found["image files"].status == "failed"
    assert found["image files"].measured == "1 of 1 held out are trained on: a = c"


def test_a_sample_in_both_splits_fails(tmp_path: Path) -> None:
    rows = [sample("a", "train"), sample("b", "test"), sample("b", "train")]
    assert statuses(tmp_path, rows) == {"sample_id": "failed", "image files": "failed"}


def test_copies_within_a_split_are_none_of_its_business(tmp_path: Path) -> None:
    train = [sample("a", "train", b"x"), sample("b", "train", b"x")]
    rows = [*train, sample("c", "test", b"y"), sample("d", "test", b"y")]
    assert set(statuses(tmp_path, rows).values()) == {"ok"}


def test_measured_hashes_are_compared_in_place_of_files(tmp_path: Path) -> None:
    def hashed(name: str, split: str, pixels: str, code: int, flat: bool = False) -> dict[str, Any]:
        return sample(name, split, b"same", bytes_hash=name, pixels_hash=pixels, phash=code, flat=flat)

    rows = [
        hashed("a", "train", "p1", 1),
        hashed("b", "test", "p1", 2),  # the pixels of a in another file
        hashed("c", "train", "p3", 2**63),
        hashed("d", "test", "p4", 2**63),  # looks like c
    ]
    expected = {"sample_id": "ok", "image files": "ok", "pixels": "failed", "perceptual codes": "noted"}
    assert statuses(tmp_path / "one", rows, hashes=True) == expected
    flat = [hashed("a", "train", "p1", 7, flat=True), hashed("b", "test", "p2", 7, flat=True)]
    assert statuses(tmp_path / "two", flat, hashes=True)["perceptual codes"] == "ok"


def test_documents_may_share_logos_but_not_be_the_same(tmp_path: Path) -> None:
    def document(name: str, split: str, *images: bytes) -> dict[str, Any]:
        shown = [{"bytes": data, "path": None} for data in images]
        return {"document_id": name, "images": [*shown, None], "texts": [None] * len(shown) + ["."], "split": split}

    def both(root: Path, *rows: dict[str, Any]) -> dict[str, str]:
        return {f.subject: f.status for f in check_contamination(*publish(root, list(rows), INTERLEAVED, "documents"))}

    shared = both(tmp_path / "one", document("a", "train", b"logo", b"1"), document("b", "test", b"2", b"logo"))
    assert shared == {"document_id": "ok", "image files": "noted"}
    same = both(tmp_path / "two", document("a", "train", b"1"), document("a", "test", b"2"))
    assert same == {"document_id": "failed", "image files": "ok"}
