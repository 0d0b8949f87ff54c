"""A sweep of one threshold over twenty values, for all samples and by language, on a million samples.

The evidence is that of `benchmarks.decide`; nothing is cached between repetitions but what the disk keeps.
"""

import statistics
import tempfile
import time

import numpy as np

from benchmarks.decide import POLICY, SAMPLES_IN_ALL, make_evidence
from benchmarks.record import record
from storage.warehouse import Warehouse
from tasks.curation.policy import load_policy
from tasks.curation.whatif import compare, sweep

VALUES = [0.2 + step / 100 for step in range(20)]
REPETITIONS = 5


def main() -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory(prefix="tamis-") as folder:
        warehouse = Warehouse(folder)
        pool, signals, pairs = make_evidence(warehouse, np.random.default_rng(0))
        policy = load_policy(POLICY)
        seconds = []
        for _ in range(REPETITIONS):
            begin = time.perf_counter()
            sweep(pool, policy, "clip_min", VALUES, signals, warehouse=warehouse, by="language")
            seconds.append(round(time.perf_counter() - begin, 2))
        begin = time.perf_counter()
        other = policy.with_parameters({"clip_min": 0.3})
        compare(pool, policy, other, signals, pairs, warehouse=warehouse, by="language")
        comparison = round(time.perf_counter() - begin, 2)
    figures = {"sweep_1m_seconds": statistics.median(seconds), "compare_1m_seconds": comparison}
    record("whatif", figures, samples=SAMPLES_IN_ALL, values=len(VALUES), all_sweep_seconds=seconds)
    print(*(f"{name:22} {value:8.2f}" for name, value in figures.items()), sep="\n")


if __name__ == "__main__":
    main()
