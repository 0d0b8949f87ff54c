"""A small warehouse written by hand: a pool, its signals' tables and pairs, from rows you can see in the test."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.record import Record, write_record
from storage.refs import PairsRef, PoolRef, ShardRef, SignalRef
from storage.schema import PAIRS, SAMPLES, column
from storage.warehouse import Warehouse

SIGNALS = {
    "size": {
        "width": pa.int32(),
        "height": pa.int32(),
        "aspect": pa.float32(),
        "format": pa.string(),
        "file_bytes": pa.int64(),
        "frames": pa.int32(),
    },
    "caption": {
        "caption_words": pa.int32(),
        "caption_chars": pa.int32(),
        "special_ratio": pa.float32(),
        "caption_is_url": pa.bool_(),
        "caption_is_filename": pa.bool_(),
        "caption_is_boilerplate": pa.bool_(),
    },
    "characters": {"alnum_ratio": pa.float32(), "letter_ratio": pa.float32(), "char_repetition": pa.float32()},
    "words": {
        "letter_words": pa.int32(),
        "stop_word_ratio": pa.float32(),
        "flagged_word_ratio": pa.float32(),
        "word_repetition": pa.float32(),
    },
    "language": {"language": pa.string(), "language_score": pa.float32()},
    "perceptual": {"phash": pa.uint64(), "flat": pa.bool_()},
    "clip": {"clip_score": pa.float32(), "image_embedding": pa.list_(pa.float16(), 2)},
    "nsfw": {"nsfw_score": pa.float32()},
    "semantic_clusters": {"semantic_cluster": pa.int32(), "centroid_distance": pa.float32()},
    "concepts": {"concept_count": pa.int32(), "concepts": pa.list_(pa.string())},
    "cluster": {"cluster": pa.int32(), "cluster_wanted": pa.bool_()},
}
"""Columns of the signals, as the contracts between the parts name them."""

SCHEMA = pa.schema([pa.field(name, kind) for columns in SIGNALS.values() for name, kind in columns.items()])

GOOD: dict[str, Any] = {
    "width": 640,
    "height": 480,
    "aspect": 4 / 3,
    "format": "jpeg",
    "file_bytes": 50_000,
    "frames": 1,
    "caption_words": 8,
    "caption_chars": 40,
    "special_ratio": 0.0,
    "caption_is_url": False,
    "caption_is_filename": False,
    "caption_is_boilerplate": False,
    "alnum_ratio": 0.8,
    "letter_ratio": 0.8,
    "char_repetition": 0.0,
    "letter_words": 8,
    "stop_word_ratio": 0.5,
    "flagged_word_ratio": 0.0,
    "word_repetition": 0.0,
    "language": "en",
    "language_score": 0.9,
    "phash": 0,
    "flat": False,
    "clip_score": 0.3,
    "image_embedding": [0.0, 1.0],
    "nsfw_score": 0.01,
    "concept_count": 1,
    "concepts": ["thing"],
    "cluster": 0,
    "semantic_cluster": 0,
    "centroid_distance": 0.3,
    "cluster_wanted": True,
}
"""A sample that passes every shipped policy; rows say only what differs."""

Rows = Mapping[str, Mapping[str, Any]]
"""Samples by id, each with its own columns (`caption`, `url`, …) and what its signals measured."""


def write_pool(warehouse: Warehouse, *shards: Rows, name: str = "pool") -> PoolRef:
    """Write shards of samples, one after the other. Equal rows make the same shard again."""
    refs = []
    for rows in shards:
        table = pa.table(
            {
                "sample_id": list(rows),
                "key": [f"key-{sample}" for sample in rows],
                "image": [{"bytes": b"image of " + sample.encode(), "path": f"{sample}.jpg"} for sample in rows],
                "caption": [row.get("caption", f"caption of {sample}") for sample, row in rows.items()],
                "url": [row.get("url") for row in rows.values()],
                "source": [{"path": "source.tar", "member": sample} for sample in rows],
                "metadata": [row.get("metadata", "{}") for row in rows.values()],
            },
            schema=SAMPLES,
        )
        ref = ShardRef(name, fingerprint([list(rows), table["caption"].to_pylist()]), len(rows))
        warehouse.write_table(ref.path, table)
        refs.append(ref)
    return PoolRef(name, tuple(sorted(refs, key=lambda ref: ref.name)))


def write_signals(
    warehouse: Warehouse, pool: PoolRef, rows: Rows, *, signals: Sequence[str] = tuple(SIGNALS), fingerprint_: str = "1"
) -> list[SignalRef]:
    """Write the tables of `signals` for every shard of the pool."""
    refs = [SignalRef(signal, fingerprint_) for signal in signals]
    for ref in refs:
        columns = SIGNALS[ref.signal]
        fields = [column("sample_id", pa.string(), "id"), *(column(n, k, f"what {n} is") for n, k in columns.items())]
        for shard in pool.shards:
            ids = warehouse.read_table(shard.path, ["sample_id"])["sample_id"].to_pylist()
            values = {name: [{**GOOD, **rows[sample]}[name] for sample in ids] for name in columns}
            warehouse.write_table(ref.table(shard), pa.table({"sample_id": ids, **values}, schema=pa.schema(fields)))
        write_record(warehouse, f"{ref.folder}/signal.json", Record("measure", ref.fingerprint, {}, {}))
    return refs


def write_pairs(warehouse: Warehouse, kind: str, pairs: Sequence[tuple[str, str, float]]) -> PairsRef:
    """Write one table of pairs."""
    identity = fingerprint([kind, [list(pair) for pair in pairs]])
    path = f"pairs/{kind}@{identity}/pairs.parquet"
    rows = [dict(zip(PAIRS.names, pair, strict=True)) for pair in pairs]
    warehouse.write_table(path, pa.Table.from_pylist(rows, schema=PAIRS))
    return PairsRef(kind, identity, (path,))


def files(warehouse: Warehouse, folder: str) -> dict[str, bytes]:
    """All files below a folder by path, with their bytes."""
    root = warehouse.local_path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
