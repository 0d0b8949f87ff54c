"""What if, by language, on a million samples: one threshold at twenty values, and two policies with their duplicates.

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
        other = policy.with_parameters({"clip_min": 0.3})
        sweeps, comparisons = [], []
        for _ in range(REPETITIONS):
            begin = time.perf_counter()
            sweep(pool, policy, "clip_min", VALUES, signals, warehouse=warehouse, by="language")
            between = time.perf_counter()
            compare(pool, policy, other, signals, pairs, warehouse=warehouse, by="language")
            sweeps.append(round(between - begin, 2))
            comparisons.append(round(time.perf_counter() - between, 2))
    figures: dict[str, float | int | str] = {
        "sweep_1m_seconds": statistics.median(sweeps),
        "compare_1m_seconds": statistics.median(comparisons),
    }
    record(
        "whatif",
        figures,
        samples=SAMPLES_IN_ALL,
        values=len(VALUES),
        all_sweep_seconds=sweeps,
        all_compare_seconds=comparisons,
    )
    print(*(f"{name:22} {value:8.2f}" for name, value in figures.items()), sep="\n")


if __name__ == "__main__":
    main()
