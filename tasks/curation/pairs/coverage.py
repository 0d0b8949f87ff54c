"""Which pair tables cover a pool, and what is left to look for when it has grown.

Tables are only ever added, each with a record of the shards it was made for, so what was compared once stays compared.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.record import Record, read_record, write_record
from storage.refs import Outcome, PairsRef, PoolRef, ShardRef
from storage.warehouse import Warehouse

Join = Callable[[Sequence[ShardRef], Sequence[ShardRef]], pa.Table]
"""Finds all pairs with one end in the first shards and the other in any, in stored form."""


def extend(
    kind: str, config: Mapping[str, Any], pool: PoolRef, join: Join, *, warehouse: Warehouse
) -> Outcome[PairsRef]:
    """Return tables of pairs that cover `pool`, made under `config`; looks only for what no table covers yet.

    Cached if there was nothing to look for. The reference's fingerprint is that of the kind and `config`, whatever the
    pool. Two processes at once do the same work twice at worst, never damage.
    """
    identity = fingerprint([kind, config])
    folder = f"pairs/{kind}@{identity}"
    shards = {shard.name: shard for shard in pool.shards}
    tables = read_tables(folder, warehouse)
    cover = find_cover(list(shards), tables)
    if not cover.new:
        return Outcome(PairsRef(kind, identity, cover.paths), cached=True)
    inputs = {"new": list(cover.new), "old": list(cover.old)}
    path = f"{folder}/{fingerprint(inputs)}"
    pairs = join([shards[name] for name in cover.new], [shards[name] for name in cover.old])
    warehouse.write_table(f"{path}.parquet", pairs)
    counts = {
        "new": sum(shards[name].rows for name in cover.new),
        "old": sum(shards[name].rows for name in cover.old),
        "rows": pairs.num_rows,
    }
    write_record(warehouse, f"{path}.json", Record(f"find {kind} pairs", identity, config, inputs, counts))
    made = Table(f"{path}.parquet", frozenset(cover.new), frozenset(cover.old))
    return Outcome(PairsRef(kind, identity, find_cover(list(shards), [*tables, made]).paths), cached=False)


@dataclass(frozen=True)
class Table:
    """A finished table of pairs, and the names of the shards it was made for.

    It holds all pairs of samples of which one is in a new shard and the other in a new or old one.
    """

    path: str
    new: frozenset[str]
    old: frozenset[str]


@dataclass(frozen=True)
class Cover:
    """Tables to read for a pool, and the shards to compare, new with new and old, for what they leave out."""

    paths: tuple[str, ...]
    new: tuple[str, ...]
    old: tuple[str, ...]


def read_tables(folder: str, warehouse: Warehouse) -> list[Table]:
    """Return the tables in a folder whose record is there too, by name."""
    files = set(warehouse.names(folder))
    tables = []
    for file in sorted(name for name in files if name.endswith(".json")):
        table = file.removesuffix(".json") + ".parquet"
        record = read_record(warehouse, f"{folder}/{file}")
        if record is not None and table in files:
            tables.append(Table(f"{folder}/{table}", frozenset(record.inputs["new"]), frozenset(record.inputs["old"])))
    return tables


def find_cover(shards: Sequence[str], tables: Sequence[Table]) -> Cover:
    """Return which tables to read for `shards` and what they leave to compare, nothing if `new` is empty.

    The rule: a table covers the pairs of shards new × (new ∪ old), and tables cover a pool when each pair of its
    shards, each shard with itself included, is covered by one of them. It is right because any two samples lie in such
    a pair of shards, so one of the tables was made comparing just these two, whoever made it, when and for which pool;
    and because each table is complete by itself (see `read_pairs`), so that nothing in it rests on a table that is not
    read. Shards outside the pool only add rows about samples outside it.

    Tables are taken largest first; one that covers nothing more is not read. New are the shards never compared with
    themselves, then, where pools grew apart, those with most comparisons left, until each one left has a new end.
    """
    bit = {name: 1 << place for place, name in enumerate(sorted(set(shards)))}

    def bits(names: Iterable[str]) -> int:
        return reduce(or_, (bit[name] for name in names if name in bit), 0)

    everything = bits(bit)
    compared = dict.fromkeys(bit, 0)
    paths = []
    for _, path, new, both in sorted(_in_pool(table, bits) for table in tables):
        if any(new & bit[name] and both & ~compared[name] for name in bit):
            paths.append(path)
            for name in bit:
                compared[name] |= (both if new & bit[name] else 0) | (new if both & bit[name] else 0)

    left = {name: everything & ~compared[name] for name in bit}
    new = bits(name for name in bit if left[name] & bit[name])
    for name in sorted(bit, key=lambda name: (-(left[name] & ~new).bit_count(), name)):
        new |= bit[name] if left[name] & ~new and not new & bit[name] else 0
    partners = reduce(or_, (left[name] for name in bit if new & bit[name]), 0)
    return Cover(
        tuple(sorted(paths)),
        tuple(name for name in bit if new & bit[name]),
        tuple(name for name in bit if partners & ~new & bit[name]),
    )


def _in_pool(table: Table, bits: Callable[[Iterable[str]], int]) -> tuple[int, str, int, int]:
    """Return a table's rank, path, new shards and new or old shards within a pool."""
    new, both = bits(table.new), bits(table.new | table.old)
    return -new.bit_count() * both.bit_count(), table.path, new, both
