"""A published snapshot of drawn scenes for the measurements on a GPU."""

import io
import random

import pyarrow as pa

from storage.refs import SnapshotRef
from storage.schema import CURATED
from storage.snapshot import Draft, FileEntry, commit
from storage.warehouse import Warehouse
from tasks.curation.scene import describe, draw_scene, render


def publish_scenes(warehouse: Warehouse, *, samples: int, size: tuple[int, int]) -> SnapshotRef:
    """Publish scenes of `size` (width, height), px: `samples` of them to train on, and 16 in each other split."""
    rng = random.Random(0)
    rows = []
    for at in range(samples + 32):
        scene, picture = draw_scene(rng), io.BytesIO()
        render(scene, size=size, seed=at).save(picture, "JPEG")
        row = {
            "sample_id": f"{at:032x}",
            "image": {"bytes": picture.getvalue(), "path": f"{at}.jpg"},
            "caption": describe(scene, rng),
            "split": "train" if at < samples else ("validation", "test")[at % 2],
        }
        rows.append(row)
    path = "snapshots/scenes/curated/scenes.parquet"
    warehouse.write_table(path, pa.Table.from_pylist(rows, schema=CURATED))
    entry = FileEntry(path=path, rows=len(rows), bytes=0, sha256="scenes", pool_shard="scenes")
    draft = Draft(
        pool="scenes",
        pool_shards=("scenes",),
        policy={},
        signals={},
        pairs={},
        decisions=(),
        curated=(entry,),
        published=None,
        counts={},
    )
    return commit(warehouse, "scenes", lambda latest: draft).ref
