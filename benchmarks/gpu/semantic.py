"""Semantic pairs on a GPU: a million embeddings of 512 numbers, and the same pairs as without one at 200,000.

    python -m benchmarks.gpu.semantic

What is found with and without the GPU is compared pair by pair; centroids differ in their last bits, so a few pairs
across borders of clusters may too.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.record import record
from benchmarks.semantic import find, write
from storage.warehouse import Warehouse

WITHOUT_GPU = "--without-gpu"


def main() -> None:
    """Measure, compare and record."""
    figures: dict[str, float | int] = {}
    with tempfile.TemporaryDirectory() as folder:
        warehouse = Warehouse(folder)
        pool, copies = write(warehouse, 1)
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.semantic", WITHOUT_GPU, folder],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=True,
        )
        figures["cpu_seconds_200k"] = float(output.stdout.split()[-1])
        without = {tuple(map(int, line.split())) for line in Path(folder, "pairs.txt").read_text().splitlines()}
        for pattern in ("signals/semantic_clusters@*", "pairs", "clusters"):
            for made in Path(folder).glob(pattern):
                shutil.rmtree(made)
        begun = time.perf_counter()
        found, _ = find(pool, warehouse)
        figures["gpu_seconds_200k"] = time.perf_counter() - begun
        figures["recall_200k"] = len(copies & found) / len(copies)
        figures["share_of_pairs_in_both"] = len(found & without) / len(found | without)
    with tempfile.TemporaryDirectory() as folder:
        pool, copies = write(Warehouse(folder), 5)
        torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        found, steps = find(pool, Warehouse(folder))
        figures["gpu_seconds_1m"] = time.perf_counter() - begun
        figures["recall_1m"] = len(copies & found) / len(copies)
        figures["gpu_peak_gib_1m"] = torch.cuda.max_memory_allocated() / 2**30
    for name, value in figures.items():
        print(f"{name:24} {value:10.4f}")
    record("gpu_semantic", figures, device=torch.cuda.get_device_name(), steps=steps, pairs=len(found))


def find_without_gpu(folder: str) -> None:
    """Find the pairs of what lies in a folder, write them beside it, and print the seconds."""
    pool, _ = write(Warehouse(tempfile.mkdtemp()), 1)
    begun = time.perf_counter()
    found, _ = find(pool, Warehouse(folder))
    seconds = time.perf_counter() - begun
    Path(folder, "pairs.txt").write_text("\n".join(f"{left} {right}" for left, right in sorted(found)))
    print(seconds)


if __name__ == "__main__":
    find_without_gpu(sys.argv[2]) if WITHOUT_GPU in sys.argv else main()
