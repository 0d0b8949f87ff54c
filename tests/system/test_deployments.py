"""Deployments on a real server: what the README's commands do, run by a real worker."""

import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flows.demo import scores
from storage.catalog import connect
from storage.snapshot import find_snapshot
from storage.warehouse import Warehouse
from tasks.curation.sample_truth import FILTERS, SampleTruth
from tests.system.processes import Server, wait_until


def all_runs(server: Server) -> list[dict[str, Any]]:
    """All flow runs, oldest first."""
    request = urllib.request.Request(
        f"{server.url}/api/flow_runs/filter", data=b'{"sort": "EXPECTED_START_TIME_ASC"}', method="POST"
    )
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        runs: list[dict[str, Any]] = json.load(answer)
    return runs


def deployed_runs(server: Server) -> list[dict[str, Any]]:
    """All flow runs of deployments that are due, oldest first."""
    return [run for run in all_runs(server) if run["deployment_id"] and run["state_name"] != "Scheduled"]


def wait_for_triggered(server: Server) -> dict[str, Any]:
    """Return the flow run that an event started, once it has ended."""
    deadline = time.monotonic() + 600
    while True:
        runs = [run for run in deployed_runs(server) if (run["created_by"] or {}).get("type") == "AUTOMATION"]
        if runs and runs[0]["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return runs[0]
        assert time.monotonic() < deadline, f"no flow run was started by an event, or it did not end: {runs}"
        time.sleep(1)


@pytest.mark.system
def test_the_nightly_curation_is_planned(worker: Server) -> None:
    wait_until(lambda: any(run["auto_scheduled"] for run in all_runs(worker)), seconds=120)


@pytest.mark.system
@pytest.mark.timeout(1800)
def test_curate_runs_from_the_command_line_and_its_snapshot_starts_training(
    worker: Server, sample: SampleTruth, tmp_path: Path
) -> None:
    root = str(tmp_path / "warehouse")
    parameters = ("--param", "dataset=production", "--param", f"warehouse={root}", "--param", f"source={sample.source}")
    worker.prefect("deployment", "run", "curate/sample", *parameters, "--watch")

    triggered = wait_for_triggered(worker)
    assert triggered["state_name"] == "Completed"
    found = scores(sample, find_snapshot(Warehouse(root), "production"), warehouse=Warehouse(root))
    least = {s.oddity: s.recall if s.precision is None else min(s.recall, s.precision) for s in found}
    assert [s for s in found if least[s.oddity] < (0.98 if s.deterministic else 0.95)] == []
    assert [s.oddity for s in found] == list(FILTERS)
    assert {triggered["parameters"][name] for name in ("dataset", "snapshot", "warehouse")} == {"production", 1, root}
    with connect(Warehouse(root)) as catalog:
        assert catalog.execute("SELECT dataset, snapshot FROM runs").fetchall() == [("production", 1)]
        [(trained, samples)] = catalog.execute(
            "SELECT (SELECT count(*) FROM lineage), (SELECT samples FROM runs)"
        ).fetchall()
    assert trained == samples > 0
