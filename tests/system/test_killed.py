"""A curation killed at any stage, then run again, publishes the bytes an undisturbed one does."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from storage.snapshot import latest
from storage.warehouse import Warehouse
from tasks.curation.sample_truth import SampleTruth
from tests.system.processes import Server, end, wait_until

FORKS = """
import os, sys
import onnxruntime, open_clip  # what scoring imports
from flows.curate import curate
from tasks.curation.signals import SignalSettings
for warehouse in map(str.strip, sys.stdin):
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    os.setsid()
    os.dup2(2, 1)
    curate(dataset="sample", source=sys.argv[1], warehouse=warehouse,
           signals=SignalSettings(clip_model="local-dir:tasks/sample_models/clip"))
    os._exit(0)
"""
"""Curates into each warehouse that it reads, in a process of its own that need not import anything again."""

STAGES = {
    "ingest": "pools/sample/*.parquet",
    "scoring": "signals/size@*/*.parquet",
    "pairing": "pairs/bytes@*/*.parquet",
    "publishing": "snapshots/sample/curated/*.parquet",
}


def published(root: Path) -> dict[str, bytes]:
    """Every file that the latest manifest names, and the manifest without its time."""
    manifest = latest(Warehouse(str(root)), "sample")
    assert manifest
    entries = [*manifest.decisions, *manifest.curated, *([manifest.published] if manifest.published else [])]
    content = json.loads((root / manifest.ref.manifest).read_text())
    del content["created_at"]
    files = {entry.path: (root / entry.path).read_bytes() for entry in entries}
    return {**files, "manifest": json.dumps(content, sort_keys=True).encode()}


@pytest.fixture
def curations(server: Server, sample: SampleTruth) -> Iterator[subprocess.Popen[bytes]]:
    process = server.start(sys.executable, "-c", FORKS, sample.source, talking=True)
    yield process
    end(process, signal.SIGKILL)


@pytest.mark.system
@pytest.mark.timeout(1800)
def test_a_curation_killed_at_every_stage_publishes_the_same_bytes(
    curations: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    def run(root: Path, *, kill_at: str | None = None) -> None:
        assert curations.stdin
        assert curations.stdout
        curations.stdin.write(f"{root}\n".encode())
        pid = int(curations.stdout.readline())
        if kill_at:
            wait_until(lambda: any(root.glob(kill_at)) or not psutil.pid_exists(pid), seconds=400)
            assert psutil.pid_exists(pid), "it ended before it could be killed"
            os.killpg(pid, signal.SIGKILL)
        assert int(curations.stdout.readline()) == (-signal.SIGKILL if kill_at else 0)
        assert (latest(Warehouse(str(root)), "sample") is None) == (kill_at is not None)

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    run(undisturbed)
    for pattern in STAGES.values():
        run(disturbed, kill_at=pattern)
    run(disturbed)
    assert published(disturbed) == published(undisturbed)
