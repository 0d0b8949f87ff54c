"""Pools of shards whose signal tables are written by hand: sample ids and codes you can see in the test."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from storage.refs import PoolRef, ShardRef, SignalRef
from storage.warehouse import Warehouse

PERCEPTUAL = SignalRef("perceptual", "p1")
EXACT = SignalRef("exact", "e1")
CLIP = SignalRef("clip", "c1")


def perceptual_shard(
    warehouse: Warehouse, name: str, codes: Mapping[str, int | None], *, flat: Sequence[str] = ()
) -> ShardRef:
    """Write the perceptual signal of one shard: each sample's hash, and which samples are flat."""
    columns = {"phash": (codes.values(), pa.uint64()), "flat": ([sample in flat for sample in codes], pa.bool_())}
    return _shard(warehouse, PERCEPTUAL, name, list(codes), columns)


def exact_shard(warehouse: Warehouse, name: str, hashes: Mapping[str, tuple[str | None, str | None]]) -> ShardRef:
    """Write the exact signal of one shard: each sample's hash of bytes and of pixels."""
    columns = {
        column: ([pair[place] for pair in hashes.values()], pa.string())
        for place, column in enumerate(["bytes_hash", "pixels_hash"])
    }
    return _shard(warehouse, EXACT, name, list(hashes), columns)


def clip_shard(
    warehouse: Warehouse, name: str, vectors: Mapping[str, Sequence[float] | np.ndarray | None], *, size: int
) -> ShardRef:
    """Write the clip signal of one shard: each sample's embedding of `size` numbers, kept as float16."""
    rows = [None if vector is None else list(np.asarray(vector, np.float16)) for vector in vectors.values()]
    kind = pa.list_(pa.field("element", pa.float16()), size)
    return _shard(warehouse, CLIP, name, list(vectors), {"image_embedding": (rows, kind)})


def pool(*shards: ShardRef) -> PoolRef:
    """A pool of shards."""
    return PoolRef("pool", tuple(sorted(shards)))


def rows(table: pa.Table) -> list[tuple[str, str, float]]:
    """A table of pairs as tuples."""
    return [tuple(row.values()) for row in table.to_pylist()]


def _shard(
    warehouse: Warehouse, signal: SignalRef, name: str, ids: list[str], columns: Mapping[str, tuple[Any, pa.DataType]]
) -> ShardRef:
    shard = ShardRef("pool", name, len(ids))
    arrays = {column: pa.array(values, kind) for column, (values, kind) in columns.items()}
    warehouse.write_table(signal.table(shard), pa.table({"sample_id": pa.array(ids, pa.string()), **arrays}))
    return shard
