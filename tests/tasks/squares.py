"""A small snapshot written by hand: plain-coloured squares, with their colour as the answer."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
from PIL import Image

from storage.refs import SnapshotRef
from storage.schema import CURATED
from storage.snapshot import Draft, FileEntry, Manifest, commit
from storage.warehouse import Warehouse

COLOURS = ("red", "green", "blue", "yellow")
SPLITS = ("train",) * 14 + ("validation",) * 5 + ("test",) * 5
WITHOUT_ANSWER = 3


def curated_rows() -> list[dict[str, object]]:
    """One plain-coloured image per row, of several sizes and modes; one train row has no answer."""
    rows = []
    for at, split in enumerate(SPLITS):
        colour = COLOURS[at % len(COLOURS)]
        picture = io.BytesIO()
        size = (40 + 10 * (at % 5), 60)
        mode, kind = (("RGB", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG"))[at // 4 % 4]
        Image.new("RGB", size, colour).convert(mode).save(picture, kind)
        answer = {} if at == WITHOUT_ANSWER else {"answer": f"{colour} square"}
        rows.append(
            {
                "sample_id": hashlib.sha256(str(at).encode()).hexdigest()[:32],
                "key": str(at),
                "image": {"bytes": picture.getvalue(), "path": f"{at}.{kind.lower()}"},
                "caption": f"A {colour} square, number {at}",
                "metadata": json.dumps(answer),
                "split": split,
            }
        )
    return rows


def publish(root: Path) -> tuple[Warehouse, SnapshotRef]:
    """Publish `curated_rows` as a snapshot of two shards."""
    warehouse = Warehouse(str(root))
    entries = []
    for name, rows in (("a", curated_rows()[::2]), ("b", curated_rows()[1::2])):
        path = f"snapshots/squares/curated/{name}.parquet"
        warehouse.write_table(path, pa.Table.from_pylist(rows, schema=CURATED))
        entries.append(FileEntry(path=path, rows=len(rows), bytes=0, sha256=name, pool_shard=name))

    def build(_: Manifest | None) -> Draft:
        return Draft(
            pool="squares",
            pool_shards=("a", "b"),
            policy={},
            signals={},
            pairs={},
            decisions=(),
            curated=tuple(entries),
            published=None,
            counts={},
        )

    return warehouse, commit(warehouse, "squares", build).ref
