"""Clusters of a pool's embeddings: centroids trained once and kept, and the clusters near each sample.

They tell which samples to compare for semantic pairs, and how typical each is: SemDeDup's hard and easy samples.
"""

import importlib
from collections.abc import Iterable
from math import isqrt
from typing import Any

import numpy as np
import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.record import Record, read_record, write_record
from storage.refs import Outcome, PoolRef, ShardRef, SignalRef
from storage.schema import SAMPLE_ID, column
from storage.warehouse import Warehouse
from tasks.curation.pairs.embeddings import Vectors, embedding_size, read_embeddings
from tasks.curation.pairs.members import PairsError

VERSION = 1
GROWTH = 4
"""How many times larger or smaller a pool may be than the one that centroids were trained on."""

FEW = 20_000
"""Samples up to which one cluster holds all, so that every two are compared."""
SAMPLED = 256
"""Samples a cluster to train on, at most; faiss's own limit too."""
MOST_CLUSTERS = 4_096
"""Clusters at most: training takes time with their square."""
ROUNDS, SEED = 10, 1234
"""Rounds of k-means, a tenth of SemDeDup's: what lies near a border is compared on both sides, wherever that runs."""
PROBES = 3
"""Clusters that an embedding may be compared with: its own and the next nearest ones."""
MARGIN = 0.1
"""How much less near than its own a cluster may be (difference of cosines) for an embedding to be compared with it.

Two near embeddings lie in different clusters if the border runs between them, so both are close to the border.
"""

COLUMNS = pa.schema(
    [
        column("semantic_cluster", pa.int32(), "number of the nearest centroid; null without an embedding"),
        column("centroid_distance", pa.float32(), "1 - cosine of image embedding and its centroid; large is unusual"),
    ]
)
"""What a policy may use of the clusters."""

TABLE = pa.schema(
    [SAMPLE_ID, *COLUMNS, column("other_clusters", pa.list_(pa.int32()), "clusters nearly as near as its own")]
)


def cluster_embeddings(pool: PoolRef, signal: SignalRef, *, warehouse: Warehouse) -> Outcome[SignalRef]:
    """Find the clusters near each sample of `pool` by `signal`'s image embeddings; cached where they are known.

    Centroids are trained on a sample of the pool as it is the first time. While it grows by less than `GROWTH` times
    they are kept, so that only new shards are looked at; after that new ones are trained, and the reference is another.
    Raises `PairsError` if the pool is empty, or `signal` has not measured a shard or holds no image embeddings.
    """
    if not pool.rows:
        raise PairsError(f"pool {pool.name} has no samples to cluster. Ingest a source into it first.")
    for shard in pool.shards:
        embedding_size(signal, shard, warehouse)
    config = {
        "version": VERSION,
        "pool": pool.name,
        "signal": signal.fingerprint,
        "rounds": ROUNDS,
        "sampled": SAMPLED,
        "probes": PROBES,
        "margin": MARGIN,
    }
    folder = f"clusters/{pool.name}@{fingerprint(config)}"
    identity = _find_centroids(folder, pool, warehouse)
    if identity is None:
        inputs = {"shards": [shard.name for shard in pool.shards]}
        identity = fingerprint([config, inputs])
        centroids = _kmeans().train(_sample(pool, signal, warehouse), cluster_count(pool.rows))
        warehouse.write_table(_path(folder, identity), _as_table(centroids))
        counts = {"rows": pool.rows, "clusters": len(centroids)}
        write_record(
            warehouse, f"{folder}/{identity}.json", Record("train centroids", identity, config, inputs, counts)
        )
    ref = SignalRef("semantic_clusters", identity)
    missing = [shard for shard in pool.shards if not warehouse.exists(ref.table(shard))]
    if missing:
        find_nearest = _kmeans().find_nearest
        stored = warehouse.read_table(_path(folder, identity))["centroid"].combine_chunks()
        centroids = np.asarray(stored.flatten()).reshape(len(stored), -1)
        write_record(warehouse, f"{ref.folder}/signal.json", Record("signal", identity, config, {}))
    for shard in missing:
        parts = (
            (find_nearest(vectors, centroids), usable) for vectors, usable in read_embeddings(signal, shard, warehouse)
        )
        warehouse.write_table(ref.table(shard), _table(signal, shard, parts, warehouse))
    return Outcome(ref, cached=not missing)


def cluster_count(samples: int) -> int:
    """Return into how many clusters to cut so many samples: about the square root of their number."""
    return 1 if samples <= FEW else min(isqrt(samples), MOST_CLUSTERS)


def _kmeans() -> Any:
    return importlib.import_module("tasks.curation.pairs.kmeans")  # torch takes seconds, also where all is cached


def _find_centroids(folder: str, pool: PoolRef, warehouse: Warehouse) -> str | None:
    """Return the fingerprint of the centroids that suit the pool's size, of the largest pool if there are several."""
    files = set(warehouse.names(folder))
    found: list[tuple[int, str]] = []
    for file in files:
        name, _, kind = file.rpartition(".")
        record = read_record(warehouse, f"{folder}/{file}") if kind == "json" and f"{name}.parquet" in files else None
        if record and pool.rows <= GROWTH * record.counts["rows"] and record.counts["rows"] <= GROWTH * pool.rows:
            found.append((record.counts["rows"], name))
    return max(found)[1] if found else None


def _sample(pool: PoolRef, signal: SignalRef, warehouse: Warehouse) -> Vectors:
    """Return embeddings of rows drawn at random, the same ones for the same shards."""
    size = min(pool.rows, SAMPLED * cluster_count(pool.rows))
    drawn = np.zeros(pool.rows, np.bool_)
    drawn[np.random.default_rng(SEED).choice(pool.rows, size, replace=False, shuffle=False)] = True
    parts, begin = [], 0
    for shard in pool.shards:
        for vectors, usable in read_embeddings(signal, shard, warehouse):
            parts.append(vectors[drawn[begin : begin + len(usable)][usable]])
            begin += len(usable)
    return np.concatenate(parts)


def _table(signal: SignalRef, shard: ShardRef, parts: Iterable[tuple[Any, Any]], warehouse: Warehouse) -> pa.Table:
    """Return the shard's rows with the clusters found for those that have an embedding."""
    batches = []
    for near, usable in parts:
        place = np.full(len(usable), -1)
        place[usable] = np.arange(len(near.own))
        rows = pa.array(place, mask=~usable)
        others = near.others >= 0
        ends = np.concatenate([[0], np.cumsum(others.sum(axis=1))]).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(ends), pa.array(near.others[others]))
        batches.append([pa.array(near.own).take(rows), pa.array(near.distance).take(rows), lists.take(rows)])
    ids = warehouse.read_table(signal.table(shard), ["sample_id"])["sample_id"]
    kinds = [field.type for field in TABLE][1:]
    columns = [pa.chunked_array([batch[at] for batch in batches], kind) for at, kind in enumerate(kinds)]
    return pa.table([ids, *columns], schema=TABLE)


def _as_table(centroids: np.ndarray[Any, np.dtype[np.float32]]) -> pa.Table:
    lists = pa.FixedSizeListArray.from_arrays(pa.array(centroids.ravel()), centroids.shape[1])
    return pa.table({"cluster": pa.array(np.arange(len(centroids), dtype=np.int32)), "centroid": lists})


def _path(folder: str, identity: str) -> str:
    return f"{folder}/{identity}.parquet"
