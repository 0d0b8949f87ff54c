"""Embeddings as signals keep them: float16 lists in Parquet, read a few thousand at a time.

Rows without an embedding, and those that have no direction (all zeros, or not finite), are left out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from storage.refs import ShardRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.pairs.codes import Codes
from tasks.curation.pairs.members import PairsError

COLUMN = "image_embedding"
ROWS = 16_384
"""Embeddings read at a time."""

INFINITY = 0x7C00
"""The bits of infinity in float16, above which is what is no number."""

Vectors = NDArray[np.float16]


def embedding_size(signal: SignalRef, shard: ShardRef, warehouse: Warehouse) -> int:
    """Return how many numbers an embedding has. Raises `PairsError` if the signal was not measured or has none."""
    path = signal.table(shard)
    if not warehouse.exists(path):
        raise PairsError(
            f"{path} is not there, so embeddings can't be compared. "
            f"Score {shard.path} with the signal {signal.signal} first."
        )
    with warehouse.open_parquet(path) as table:
        schema = table.schema_arrow
    kind = schema.field(COLUMN).type if COLUMN in schema.names else None
    if kind is None or not pa.types.is_fixed_size_list(kind):
        raise PairsError(
            f"{path} has no column {COLUMN!r} of lists of one length. "
            f"Give the signal clip. Columns: {', '.join(schema.names)}."
        )
    return int(kind.list_size)


def read_embeddings(
    signal: SignalRef, shard: ShardRef, warehouse: Warehouse
) -> Iterator[tuple[Vectors, NDArray[np.bool_]]]:
    """Yield the shard's rows in parts: the embeddings there are, and for each row whether it has one."""
    size = embedding_size(signal, shard, warehouse)
    with warehouse.open_parquet(signal.table(shard)) as table:
        for batch in table.iter_batches(ROWS, columns=[COLUMN]):
            column = batch.column(0)
            vectors = np.asarray(column.flatten(), np.float16).reshape(-1, size)  # lists that are null are left out
            largest = (np.ascontiguousarray(vectors).view(np.uint16) & np.uint16(0x7FFF)).max(axis=1, initial=0)
            has_direction = (largest > 0) & (largest < INFINITY)  # magnitudes compare as their bits do
            usable = np.asarray(column.is_valid())
            usable[usable] = has_direction
            yield vectors[has_direction], usable


@dataclass(frozen=True)
class Collection:
    """The embeddings of many shards in one array on disk, and a code that equal ones share.

    `usable` says for each row of each shard, one shard after the other, whether it has an embedding; `vectors` and
    `codes` have one row for each that has.
    """

    usable: NDArray[np.bool_]
    vectors: Vectors
    codes: Codes

    @classmethod
    def read(cls, signal: SignalRef, shards: Sequence[ShardRef], *, folder: Path, warehouse: Warehouse) -> "Collection":
        """Read the embeddings of `shards` into a file in `folder`, which must stay while they are used.

        The file is mapped into memory, so the system may drop any part of it that memory is short for. Codes are 64
        bits of a hash: of a million different embeddings two share one with a chance of 1 in 30 million.
        """
        size = embedding_size(signal, shards[0], warehouse) if shards else 1
        usable, codes, path = [np.zeros(0, np.bool_)], [np.zeros(0, np.uint64)], folder / "embeddings.f16"
        with path.open("wb") as file:
            for shard in shards:
                for vectors, is_usable in read_embeddings(signal, shard, warehouse):
                    if vectors.shape[1] != size:
                        raise PairsError(f"{signal.table(shard)} has embeddings of another length than other shards.")
                    file.write(np.ascontiguousarray(vectors).data)
                    usable.append(is_usable)
                    codes.append(np.fromiter(map(xxhash.xxh3_64_intdigest, vectors), np.uint64, len(vectors)))
        count = sum(map(len, codes))
        stored = np.memmap(path, np.float16, "r", shape=(count, size)) if count else np.zeros((0, size), np.float16)
        return cls(np.concatenate(usable), stored, np.concatenate(codes))
