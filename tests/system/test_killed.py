"""A curation killed at any stage, then run again, publishes the bytes an undisturbed one does."""

import json
import signal
import sys
from pathlib import Path

import pytest

from storage.snapshot import latest
from storage.warehouse import Warehouse
from tasks.curation.sample_truth import SampleTruth
from tests.system.processes import Server, end, wait_until

SCRIPT = """
import sys
from flows.curate import curate
from tasks.curation.signals import SignalSettings
curate(dataset="sample", source=sys.argv[1], warehouse=sys.argv[2],
       signals=SignalSettings(clip_model="local-dir:tasks/sample_models/clip"))
"""

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


@pytest.mark.system
@pytest.mark.timeout(1800)
def test_a_curation_killed_at_every_stage_publishes_the_same_bytes(
    server: Server, sample: SampleTruth, tmp_path: Path
) -> None:
    def run(root: Path, *, kill_at: str | None = None) -> None:
        process = server.start(sys.executable, "-c", SCRIPT, sample.source, str(root))
        if kill_at:
            wait_until(lambda: any(root.glob(kill_at)) or process.poll() is not None, seconds=400)
            assert process.poll() is None, "it ended before it could be killed"
            end(process, signal.SIGKILL)
            assert latest(Warehouse(str(root)), "sample") is None
        else:
            assert process.wait(600) == 0

    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    run(undisturbed)
    for pattern in STAGES.values():
        run(disturbed, kill_at=pattern)
    run(disturbed)
    assert published(disturbed) == published(undisturbed)
