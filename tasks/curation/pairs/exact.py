"""Exact pairs: samples with the same image bytes, or the same pixels after decoding.

Copies under another key or caption share bytes; files saved again without loss, or with other metadata, share pixels.
"""

from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from storage.refs import Outcome, PairsRef, PoolRef, ShardRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.pairs.coverage import extend
from tasks.curation.pairs.members import Members, PairsError

VERSION = 1
KINDS = {"bytes_hash": "bytes", "pixels_hash": "pixels"}


def find_exact_pairs(
    pool: PoolRef, signal: SignalRef, *, column: Literal["bytes_hash", "pixels_hash"], warehouse: Warehouse
) -> Outcome[PairsRef]:
    """Find the samples of `pool` whose hash in `column` is equal: pairs of kind `bytes` or `pixels`, at distance 0.

    Compares only shards that were not compared before (new × all); cached if there are none. A null hash, of an image
    that can't be decoded, equals no other. Pairs are stored as `compact` says: read them with `read_pairs`.
    Raises `PairsError` if `signal` has not measured a shard, or not this column.
    """
    if column not in KINDS:
        raise PairsError(f"exact pairs can't be found by {column!r}. Columns: {', '.join(KINDS)}.")

    def join(new: Sequence[ShardRef], old: Sequence[ShardRef]) -> pa.Table:
        usable = f"{column} is not null"
        with Members.loaded(signal, [column], usable=usable, new=new, old=old, warehouse=warehouse) as members:
            return members.stored()

    config = {"version": VERSION, "signal": signal.fingerprint}
    return extend(KINDS[column], config, pool, join, warehouse=warehouse)
