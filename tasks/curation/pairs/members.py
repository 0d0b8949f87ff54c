"""The samples among which pairs are looked for, with their codes, in a DuckDB that spills to disk.

Whatever the kind of pair, what is stored follows from one query over them; only near codes are found elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import duckdb
import numpy as np
import pyarrow as pa

from storage.refs import ShardRef, SignalRef
from storage.schema import PAIRS
from storage.warehouse import Warehouse
from tasks.curation.pairs.codes import Codes
from tasks.curation.pairs.hamming import Pairs
from tasks.curation.parallel import in_order

READERS = 8
"""Tables read at once: enough to hide an object store's delay."""

LOAD = """
    create table members as select sample_id, {column} as code, is_new from rows where {usable};
    create table codes as
        select code, bool_or(is_new) as is_new, count(*) as size, min(sample_id) as centre from members group by code;
    create table near as select code as left_code, code as right_code, 0::float as distance from codes limit 0;
"""

STORED = """
    with joined as (
        select code from codes where is_new and size > 1
        union select left_code from near
        union select right_code from near
    )
    select centre as left_id, sample_id as right_id, 0::float as distance
    from joined join codes using (code) join members using (code)
    where sample_id <> centre
    union
    select least(l.centre, r.centre), greatest(l.centre, r.centre), distance
    from near join codes l on l.code = left_code join codes r on r.code = right_code
    order by left_id, right_id
"""
"""The star of each group with a new member or near one with a new member, and the near groups, by smallest ids."""


class PairsError(ValueError):
    """Pairs can't be found in what was given; the message says what is missing."""


class Members:
    """The samples of some new and old shards, in groups by code."""

    def __init__(self, database: duckdb.DuckDBPyConnection) -> None:
        self._database = database

    @classmethod
    @contextmanager
    def loaded(
        cls,
        signal: SignalRef,
        columns: Sequence[str],
        *,
        usable: str,
        new: Sequence[ShardRef],
        old: Sequence[ShardRef],
        warehouse: Warehouse,
    ) -> Iterator["Members"]:
        """Give the samples for which the SQL condition `usable` holds; the first of `columns` holds their codes.

        Raises `PairsError` if the signal has no table for a shard, or not these columns.
        """
        schema = _schema(signal, columns, [*new, *old], warehouse)
        rows = pa.RecordBatchReader.from_batches(
            schema, _batches(signal, schema, new=new, old=old, warehouse=warehouse)
        )
        with cls.of(rows, column=columns[0], usable=usable, warehouse=warehouse) as members:
            yield members

    @classmethod
    @contextmanager
    def of(cls, rows: pa.RecordBatchReader, *, column: str, usable: str, warehouse: Warehouse) -> Iterator["Members"]:
        """Give the samples in `rows` (`sample_id`, `is_new` and codes in `column`) for which `usable` holds."""
        with warehouse.workspace() as folder, duckdb.connect(config={"temp_directory": str(folder)}) as database:
            database.register("rows", rows)
            database.execute(LOAD.format(column=column, usable=usable))
            yield cls(database)

    def codes(self) -> tuple[Codes, int]:
        """Return the distinct codes, those without a new member first, and how many have none."""
        found = self._database.sql("select code, is_new from codes order by is_new, code").fetchnumpy()
        return found["code"], int(np.count_nonzero(~found["is_new"]))

    def stored(self, near: tuple[Codes, Pairs] | None = None) -> pa.Table:
        """Return all pairs that involve a new sample, in stored form; `near` are pairs of indices into codes.

        A near pair at distance 0 makes one group of two, as equal codes do.
        """
        if near is not None:
            codes, pairs = near
            table = pa.table([codes[pairs.left], codes[pairs.right], pairs.distance], names=["l", "r", "distance"])
            self._database.register("found", table)
            self._database.execute("insert into near from found")
        return self._database.sql(STORED).to_arrow_table().cast(PAIRS)


def _schema(signal: SignalRef, columns: Sequence[str], shards: Sequence[ShardRef], warehouse: Warehouse) -> pa.Schema:
    present = set(warehouse.names(signal.folder))
    for shard in shards:
        if f"{shard.name}.parquet" not in present:
            raise PairsError(
                f"{signal.table(shard)} is not there, so pairs can't be looked for. "
                f"Score {shard.path} with the signal {signal.signal} first."
            )
    with warehouse.open_parquet(signal.table(shards[0])) as table:
        schema = table.schema_arrow
    missing = [name for name in columns if name not in schema.names]
    if missing:
        raise PairsError(
            f"{signal.folder} has no column {missing[0]!r}, in which pairs are looked for. "
            f"Give the signal that measures it. Columns: {', '.join(schema.names)}."
        )
    fields = [schema.field(name).remove_metadata() for name in ("sample_id", *columns)]
    return pa.schema([*fields, pa.field("is_new", pa.bool_())])


def _batches(
    signal: SignalRef, schema: pa.Schema, *, new: Sequence[ShardRef], old: Sequence[ShardRef], warehouse: Warehouse
) -> Iterator[pa.RecordBatch]:
    def read(shard: tuple[ShardRef, bool]) -> pa.Table:
        table = warehouse.read_table(signal.table(shard[0]), schema.names[:-1])
        return pa.table([*table.columns, pa.repeat(shard[1], len(table))], schema=schema)

    for table in in_order(
        read, [*((shard, True) for shard in new), *((shard, False) for shard in old)], threads=READERS
    ):
        yield from table.to_batches()
