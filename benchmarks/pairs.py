"""All pairs of 64-bit codes within 4 and 10 bits, beside DuckDB and faiss; every method must find the same pairs.

Codes are random, with a tenth of them planted as copies with 0 to 7 flipped bits. Times are medians of a few calls.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from statistics import median

import duckdb
import faiss
import numpy as np
import pyarrow as pa

from benchmarks.record import record
from tasks.curation.pairs.codes import Codes
from tasks.curation.pairs.hamming import Pairs, hamming_pairs

MILLION = 1_000_000
FEWER = 100_000
"""Codes that are also given to faiss, which takes minutes for a million."""
NEW = 10_000
DISTANCE = 4


@dataclass
class Method:
    """One way to find all pairs: what it found, and each call's seconds of wall and of processor time."""

    find: Callable[[], np.ndarray]
    times: int
    found: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Measure one call."""
        begun, cpu_begun = time.perf_counter(), time.process_time()
        self.found = self.find()
        self.seconds.append(time.perf_counter() - begun)
        self.cpu_seconds.append(time.process_time() - cpu_begun)

    def __str__(self) -> str:
        spread = f"{min(self.seconds):.2f}–{max(self.seconds):.2f}"
        return f"{median(self.seconds):.2f} s ({spread} s, {median(self.cpu_seconds):.2f} s of CPU)"


def main() -> None:
    """Run every method, check that all agree, print a table and write the result."""
    codes, fewer = planted(MILLION), planted(FEWER)
    million = {
        "tamis": Method(lambda: key(hamming_pairs(codes)), 9),
        "tamis, 10,000 new × all": Method(lambda: key(hamming_pairs(codes, new_from=MILLION - NEW)), 9),
        "duckdb, 5 bands": Method(lambda: duckdb_pairs(codes, bands(5, 1)), 3),
        "duckdb, 15 keys of 2 of 6 bands": Method(lambda: duckdb_pairs(codes, bands(6, 2)), 9),
    }
    hundred_thousand = {
        "tamis": Method(lambda: key(hamming_pairs(fewer)), 9),
        "faiss IndexBinaryFlat": Method(lambda: faiss_pairs(faiss.IndexBinaryFlat(64), fewer), 1),
        "faiss IndexBinaryMultiHash": Method(lambda: faiss_pairs(multi_hash(), fewer), 1),
    }
    for size, methods in (("1,000,000 codes", million), ("100,000 codes", hundred_thousand)):
        expected = methods["tamis"].find()
        for turn in range(max(method.times for method in methods.values())):
            for method in methods.values():  # by turns, so that a busy machine slows all alike
                if turn < method.times:
                    method.run()
        for name, method in methods.items():
            print(f"{size:16}{name:30}{method}")
            wanted = expected[expected % MILLION >= MILLION - NEW] if "new" in name else expected
            assert np.array_equal(method.found, wanted), f"{name} found {len(method.found):,} of {len(wanted):,} pairs"

    far = Method(lambda: key(hamming_pairs(codes, max_distance=10)), 3)
    far_fewer = hamming_pairs(fewer, max_distance=10)
    for _ in range(far.times):
        far.run()
    print(f"1,000,000 codes tamis, within 10 bits          {far}")
    faiss_far = faiss_pairs(faiss.IndexBinaryFlat(64), fewer, max_distance=10)
    assert np.array_equal(key(far_fewer), faiss_far), f"found {len(far_fewer.left):,} of {len(faiss_far):,} far pairs"

    ours, fewer_ours = million["tamis"], hundred_thousand["tamis"]
    record(
        "pairs",
        {
            "hamming4_1m_seconds": median(ours.seconds),
            "hamming4_1m_cpu_seconds": median(ours.cpu_seconds),
            "hamming10_1m_seconds": median(far.seconds),
            "hamming10_1m_cpu_seconds": median(far.cpu_seconds),
            "new_10k_seconds": median(million["tamis, 10,000 new × all"].seconds),
            "ratio_to_duckdb": ratio(million["duckdb, 5 bands"], ours),
            "ratio_to_duckdb_15_keys": ratio(million["duckdb, 15 keys of 2 of 6 bands"], ours),
            "ratio_to_faiss_flat_100k": ratio(hundred_thousand["faiss IndexBinaryFlat"], fewer_ours),
            "ratio_to_faiss_multihash_100k": ratio(hundred_thousand["faiss IndexBinaryMultiHash"], fewer_ours),
        },
        pairs_found={
            "1,000,000 codes": len(ours.found),
            "100,000 codes": len(fewer_ours.found),
            "1,000,000 codes within 10 bits": len(far.found),
        },
        seconds_1m={name: str(method) for name, method in (million | {"tamis, within 10 bits": far}).items()},
        seconds_100k={name: str(method) for name, method in hundred_thousand.items()},
    )


def ratio(other: Method, ours: Method) -> float:
    """Return how many times our seconds another method takes."""
    return median(other.seconds) / median(ours.seconds)


def planted(count: int) -> Codes:
    """Return random codes of which a tenth are copies of others with 0 to 7 bits flipped, in random order."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**64, count * 9 // 10, np.uint64)
    copies = rng.choice(codes, count - len(codes))
    flips = rng.integers(0, 8, len(copies))
    for flip in range(7):
        copies ^= np.where(flip < flips, np.uint64(1) << rng.integers(0, 64, len(copies), np.uint64), np.uint64(0))
    return rng.permutation(np.concatenate([codes, copies]))


def key(pairs: Pairs) -> np.ndarray:
    """Return one sorted number a pair, so that what methods found can be compared."""
    return np.sort(pairs.left.astype(np.int64) * MILLION + pairs.right)


def bands(blocks: int, agreeing: int) -> list[str]:
    """Return SQL expressions of a code's key, one for each choice of `agreeing` out of `blocks` blocks of bits."""
    edges = [64 * block // blocks for block in range(blocks + 1)]
    masks = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
    return [f"code & {sum(chosen)}::ubigint" for chosen in combinations(masks, agreeing)]


def duckdb_pairs(codes: Codes, keys: list[str]) -> np.ndarray:
    """Join codes with themselves on each key in SQL, and keep the near ones."""
    with duckdb.connect() as connection:
        connection.register("given", pa.table({"i": np.arange(len(codes), dtype=np.uint32), "code": codes}))
        connection.execute("create table codes as from given")
        joins = [
            f"""select a.i as left_i, b.i as right_i
            from (select i, code, {key} as k from codes) a join (select i, code, {key} as k from codes) b
            on a.k = b.k and a.i < b.i
            where bit_count(xor(a.code, b.code)) <= {DISTANCE}"""
            for key in keys
        ]
        found = connection.execute(" union ".join(joins)).fetchnumpy()
    return key(Pairs(found["left_i"], found["right_i"], np.zeros(0, np.uint8)))


def multi_hash() -> faiss.IndexBinary:
    """Return faiss's own pigeonhole index: 4 hashes of 16 bits, each probed with up to one bit flipped."""
    index = faiss.IndexBinaryMultiHash(64, 4, 16)
    index.nflip = 1
    return index


def faiss_pairs(index: faiss.IndexBinary, codes: Codes, *, max_distance: int = DISTANCE) -> np.ndarray:
    """Search every code among all in a faiss index."""
    packed = codes.view(np.uint8).reshape(-1, 8)
    index.add(packed)
    limits, distance, right = index.range_search(packed, max_distance + 1)  # faiss means less than the radius
    left = np.repeat(np.arange(len(codes)), np.diff(limits.astype(np.int64)))
    once = left < right
    return key(Pairs(left[once], right[once], distance[once]))


if __name__ == "__main__":
    main()
