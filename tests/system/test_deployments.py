"""Deployments on a real server: what the README's commands do, run by a real worker."""

import json
import urllib.request
from pathlib import Path

import pytest

from storage.catalog import connect
from storage.warehouse import Warehouse
from tasks.curation.sample_truth import SampleTruth
from tests.system.processes import Server


def flow_run_states(server: Server) -> dict[str, str]:
    """The state of the newest run of each deployment's flow run, by the flow run's deployment name."""
    request = urllib.request.Request(
        f"{server.url}/api/flow_runs/filter", data=b'{"sort": "START_TIME_ASC"}', method="POST"
    )
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        runs = json.load(answer)
    return {run["parameters"].get("recipe", "curate"): run["state_name"] for run in runs if run["deployment_id"]}


@pytest.mark.system
@pytest.mark.timeout(1800)
def test_curate_and_train_run_from_the_command_line_to_completed(
    worker: Server, sample: SampleTruth, tmp_path: Path
) -> None:
    root = str(tmp_path / "warehouse")
    common = ["--param", "dataset=sample", "--param", f"warehouse={root}", "--watch"]
    worker.prefect("deployment", "run", "curate/sample", *common, "--param", f"source={sample.source}")
    worker.prefect("deployment", "run", "train/qlora", *common)
    assert flow_run_states(worker) == {"curate": "Completed", "deployments/recipes/sample.yaml": "Completed"}
    with connect(Warehouse(root)) as catalog:
        assert catalog.execute("SELECT dataset, snapshot FROM runs").fetchall() == [("sample", 1)]
        [(trained, samples)] = catalog.execute(
            "SELECT (SELECT count(*) FROM lineage), (SELECT count(*) FROM curated WHERE split = 'train')"
        ).fetchall()
    assert trained == samples > 0
