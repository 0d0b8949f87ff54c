"""Semantic pairs at 200k × 512 beside plain SemDeDup, which looks within clusters only; and memory at 1M × 512.

Embeddings lie around 2,000 topics of very unequal size; a tenth are copies at a cosine of 0.92 to 0.999 of another one.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

import faiss
import numpy as np
import pyarrow as pa
import torch

from benchmarks.record import record
from storage.refs import PoolRef, ShardRef, SignalRef
from storage.warehouse import Warehouse
from tasks.curation.pairs.clusters import cluster_count, cluster_embeddings
from tasks.curation.pairs.compact import read_pairs
from tasks.curation.pairs.semantic import find_semantic_pairs

SIZE, PART = 512, 200_000
TOPICS, SPREAD = 2_000, 1.25
FLOOR = 0.9
ROUNDS = 3
CLIP = SignalRef("clip", "benchmark")
Pairs = set[tuple[int, int]]


def main() -> None:
    """Measure both on the same shards, then memory in a process of its own; write the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semantic", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="runs of each; the median counts")
    parser.add_argument("--memory", metavar="FOLDER", help="only find the pairs of a warehouse and print what it took")
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.memory)
        return
    ours, plain, parts = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        pool, copies = write(Warehouse(folder), 1)
        for turn in range(arguments.rounds):
            warehouse = Warehouse(f"{folder}/{turn}")
            warehouse.local_path("x").parent.mkdir()
            warehouse.local_path("signals").symlink_to(f"{folder}/signals")
            begun = time.perf_counter()
            found, seconds = find(pool, warehouse)
            ours.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            found_plainly, plain_seconds = find_plainly(pool, warehouse)
            plain.append(time.perf_counter() - begun)
            parts.append({"tamis": seconds, "plain": plain_seconds})
            print(f"tamis {ours[-1]:.1f} s {seconds}, plain {plain[-1]:.1f} s {plain_seconds}", flush=True)
            warehouse.local_path("signals").unlink()
    recall, plain_recall = (len(copies & pairs) / len(copies) for pairs in (found, found_plainly))
    print(f"found {recall:.2%} of {len(copies):,} copies, plainly {plain_recall:.2%}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        million, _ = write(Warehouse(folder), 5)
        command = [sys.executable, "-m", "benchmarks.semantic", "--memory", folder]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, million_seconds = map(float, output.split()[-2:])
    print(f"1M: {peak:.2f} GiB at most, {million_seconds:.0f} s")
    record(
        "semantic",
        {
            "recall": recall,
            "plain_recall": plain_recall,
            "ratio_to_plain": median(ours) / median(plain),
            "seconds": median(ours),
            "plain_seconds": median(plain),
            "peak_gib_1m": peak,
            "seconds_1m": million_seconds,
        },
        pairs={"tamis": len(found), "plain": len(found_plainly)},
        clusters={"200,000": cluster_count(PART), "1,000,000": cluster_count(million.rows)},
        all_seconds={"tamis": ours, "plain": plain},
        steps=parts,
        threads=torch.get_num_threads(),
    )


def find(pool: PoolRef, warehouse: Warehouse) -> tuple[Pairs, dict[str, float]]:
    """Return the pairs as curation finds them, from shards to a stored table, and the seconds of its two steps."""
    begun = time.perf_counter()
    clusters = cluster_embeddings(pool, CLIP, warehouse=warehouse).ref
    clustered = time.perf_counter()
    pairs = find_semantic_pairs(pool, CLIP, clusters, max_distance=1 - FLOOR, warehouse=warehouse).ref
    seconds = {"cluster": round(clustered - begun, 2), "pair": round(time.perf_counter() - clustered, 2)}
    table = read_pairs(pairs, warehouse)
    ends = (table[name].cast(pa.int64()).to_pylist() for name in ("left_id", "right_id"))
    return set(zip(*ends, strict=True)), seconds


def find_plainly(pool: PoolRef, warehouse: Warehouse) -> tuple[Pairs, dict[str, float]]:
    """Return the pairs that SemDeDup's method finds: k-means by faiss, then cosines within each cluster.

    As many clusters as Tamis makes, 256 samples a cluster to train on as faiss has it, a fifth of the paper's rounds;
    similarities by torch. Everything is in memory, where it fits.
    """
    begun = time.perf_counter()
    parts = [warehouse.read_table(CLIP.table(shard)) for shard in pool.shards]
    ids = np.concatenate([np.asarray(part["sample_id"].cast(pa.int64())) for part in parts])
    values = [np.asarray(part["image_embedding"].combine_chunks().flatten(), np.float32) for part in parts]
    vectors = np.concatenate(values).reshape(-1, SIZE)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    means = faiss.Kmeans(
        SIZE,
        cluster_count(len(vectors)),
        niter=20,
        seed=1234,
        spherical=True,
        max_points_per_centroid=256,
    )
    means.train(vectors)
    cluster = means.index.search(vectors, 1)[1][:, 0]
    clustered = time.perf_counter()
    found: Pairs = set()
    for number in range(means.k):
        rows = np.flatnonzero(cluster == number)
        members = torch.from_numpy(vectors[rows])
        left, right = (members @ members.T >= FLOOR).triu(1).nonzero(as_tuple=True)
        pairs = np.sort(np.stack([ids[rows[left.numpy()]], ids[rows[right.numpy()]]], axis=1), axis=1)
        found.update(map(tuple, pairs.tolist()))
    return found, {"cluster": round(clustered - begun, 2), "pair": round(time.perf_counter() - clustered, 2)}


def write(warehouse: Warehouse, parts: int) -> tuple[PoolRef, Pairs]:
    """Write parts of 200,000 embeddings, each in two shards, as the signal clip; returns the pairs of copies too."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((TOPICS, SIZE), np.float32)
    topics /= np.linalg.norm(topics, axis=1, keepdims=True)
    shares = 1 / np.arange(1, TOPICS + 1) ** 0.7
    shards, copies = [], set()
    for part in range(parts):
        topic = rng.choice(TOPICS, PART * 9 // 10, p=shares / shares.sum())
        vectors = topics[topic] + SPREAD * SIZE**-0.5 * rng.standard_normal((len(topic), SIZE), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        sources = rng.choice(len(vectors), PART - len(vectors), replace=False)
        vectors = np.concatenate([vectors, at_cosine(vectors[sources], rng)])
        place = rng.permutation(PART)
        ids = part * PART + place
        copies |= set(zip(*np.sort([ids[sources], ids[PART * 9 // 10 :]], axis=0).tolist(), strict=True))
        half = vectors[np.argsort(place)].astype(np.float16)
        for begin in (0, PART // 2):
            shard = ShardRef("semantic", f"{part}-{begin}", PART // 2)
            column = pa.FixedSizeListArray.from_arrays(pa.array(half[begin : begin + PART // 2].ravel()), SIZE)
            numbers = pa.array([f"{part * PART + begin + row:09}" for row in range(PART // 2)])
            warehouse.write_table(CLIP.table(shard), pa.table({"sample_id": numbers, "image_embedding": column}))
            shards.append(shard)
    return PoolRef("semantic", tuple(sorted(shards))), copies


def at_cosine(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a unit vector for each of `vectors`, at a random cosine of 0.92 to 0.999 and in a random direction."""
    cosine = rng.uniform(0.92, 0.999, (len(vectors), 1)).astype(np.float32)
    aside = rng.standard_normal(vectors.shape, np.float32)
    aside -= (aside * vectors).sum(axis=1, keepdims=True) * vectors
    aside /= np.linalg.norm(aside, axis=1, keepdims=True)
    return cosine * vectors + np.sqrt(1 - cosine**2) * aside


def print_memory(folder: str) -> None:
    """Find the pairs of what lies in a folder, and print the most memory this process had (GiB) and the seconds."""
    warehouse = Warehouse(folder)
    names = [name.removesuffix(".parquet") for name in warehouse.names(CLIP.folder)]
    pool = PoolRef("semantic", tuple(ShardRef("semantic", name, PART // 2) for name in names))
    begun = time.perf_counter()
    clusters = cluster_embeddings(pool, CLIP, warehouse=warehouse).ref
    find_semantic_pairs(pool, CLIP, clusters, max_distance=1 - FLOOR, warehouse=warehouse)
    seconds = time.perf_counter() - begun
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, seconds)


if __name__ == "__main__":
    main()
