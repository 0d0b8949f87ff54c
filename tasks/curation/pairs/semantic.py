"""Semantic pairs: samples whose images mean the same to CLIP, as SemDeDup looks for them (Abbas et al. 2023).

Distances are 1 - cosine, kept up to a tenth, so that ε is a policy's threshold and another ε compares nothing again.
"""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from storage.refs import Outcome, PairsRef, PoolRef, ShardRef, SignalRef
from storage.schema import SAMPLE_ID
from storage.warehouse import Warehouse
from tasks.curation.pairs.codes import Indices
from tasks.curation.pairs.coverage import extend
from tasks.curation.pairs.embeddings import Collection
from tasks.curation.pairs.hamming import Pairs
from tasks.curation.pairs.members import Members, PairsError

VERSION = 1
MAX_DISTANCE = 0.1
"""How far pairs are looked for: beyond every ε of the paper."""

ROWS = pa.schema([SAMPLE_ID.remove_metadata(), pa.field("code", pa.uint64()), pa.field("is_new", pa.bool_())])


def find_semantic_pairs(
    pool: PoolRef,
    signal: SignalRef,
    clusters: SignalRef,
    *,
    max_distance: float = MAX_DISTANCE,
    warehouse: Warehouse,
) -> Outcome[PairsRef]:
    """Find the samples of `pool` whose image embeddings have 1 - cosine up to `max_distance`.

    `clusters` is what `cluster_embeddings` gave for `pool` and `signal`, and says which samples to compare: up to
    20,000 samples all, above that nearly all pairs are found (`benchmarks/semantic.py` says how many). Compares only
    shards that were not compared before (new × all); cached if there are none. Samples without an embedding are in no
    pair. Equal embeddings are at distance 0, and in crowds of hundreds what is within 0.005 counts as equal.
    Memory is flat: embeddings lie in a file, a few blocks of them in memory. Pairs are stored as `compact` says: read
    them with `read_pairs`. Raises `PairsError` if `signal` or `clusters` does not cover a shard.
    """

    def join(new: Sequence[ShardRef], old: Sequence[ShardRef]) -> pa.Table:
        shards = [*old, *new]
        with warehouse.workspace() as folder:
            found = Collection.read(signal, shards, folder=folder, warehouse=warehouse)
            rows = pa.RecordBatchReader.from_batches(ROWS, _rows(found, signal, new=new, old=old, warehouse=warehouse))
            with Members.of(rows, column="code", usable="code is not null", warehouse=warehouse) as members:
                codes, known = members.codes()
                first = _first_places(found.codes, codes)
                return members.stored(
                    (codes, _near(found, first, known, _read_clusters(clusters, shards, warehouse), max_distance))
                )

    config = {
        "version": VERSION,
        "signal": signal.fingerprint,
        "clusters": clusters.fingerprint,
        "max_distance": max_distance,
    }
    return extend("semantic", config, pool, join, warehouse=warehouse)


def _near(found: Collection, first: Indices, known: int, clusters: pa.Table, max_distance: float) -> Pairs:
    """Return the near pairs of different embeddings, of which `first` are the places."""
    cosine: Any = importlib.import_module("tasks.curation.pairs.cosine")  # torch takes seconds
    rows = np.flatnonzero(found.usable)[first]
    own = np.asarray(clusters["semantic_cluster"].take(pa.array(rows)), np.int32)
    lists = clusters["other_clusters"].take(pa.array(rows)).combine_chunks()
    counts = np.diff(np.asarray(lists.offsets))
    others = np.full((len(rows), counts.max(initial=0)), -1, np.int32)
    others[np.arange(others.shape[1]) < counts[:, None]] = np.asarray(lists.flatten())
    embeddings = cosine.Clustered(found.vectors, first, own, others, known)
    pairs: Pairs = cosine.cosine_pairs(embeddings, max_distance=max_distance)
    return pairs


def _rows(
    found: Collection, signal: SignalRef, *, new: Sequence[ShardRef], old: Sequence[ShardRef], warehouse: Warehouse
) -> Iterator[pa.RecordBatch]:
    """Yield the samples of old, then new shards with the code of their embedding, null without one."""
    place = np.cumsum(found.usable) - 1
    begin = 0
    for shard in (*old, *new):
        ids = warehouse.read_table(signal.table(shard), ["sample_id"])["sample_id"].combine_chunks()
        usable = found.usable[begin : begin + len(ids)]
        codes = pa.array(found.codes).take(pa.array(place[begin : begin + len(ids)], mask=~usable))
        yield pa.record_batch([ids, codes, pa.repeat(shard in new, len(ids))], schema=ROWS)
        begin += len(ids)


def _first_places(codes: np.ndarray[Any, np.dtype[np.uint64]], wanted: np.ndarray[Any, Any]) -> Indices:
    """Return where each wanted code is among `codes` for the first time."""
    distinct, first = np.unique(codes, return_index=True)
    return np.asarray(first[np.searchsorted(distinct, wanted)], np.int64)


def _read_clusters(clusters: SignalRef, shards: Sequence[ShardRef], warehouse: Warehouse) -> pa.Table:
    """Return the clusters of all samples, shard after shard."""
    for shard in shards:
        if not warehouse.exists(clusters.table(shard)):
            raise PairsError(
                f"{clusters.table(shard)} is not there, so semantic pairs can't be looked for. "
                "Call cluster_embeddings for the pool first."
            )
    names = ["semantic_cluster", "other_clusters"]
    return pa.concat_tables([warehouse.read_table(clusters.table(shard), names) for shard in shards])
