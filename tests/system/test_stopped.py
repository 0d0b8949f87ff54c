"""A training that is cancelled saves a checkpoint first, and the next flow run goes on from it."""

import json
import re
import urllib.request
from pathlib import Path

import pytest

from tests.system.processes import Server, wait_until
from tests.tasks.squares import publish

RECIPE = """
base_model: tasks/sample_models/gemma
prompt: "'What colour is it?'"
completion: metadata ->> 'answer'
lora_rank: 4
batch_size: 2
accumulation: 2
max_steps: 40
save_steps: 1000
"""


@pytest.mark.system
@pytest.mark.timeout(1200)
def test_a_cancelled_flow_run_saves_and_the_next_goes_on(worker: Server, tmp_path: Path) -> None:
    warehouse, _ = publish(tmp_path / "warehouse")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    parameters = {"dataset": "squares", "recipe": str(recipe), "warehouse": warehouse.root}
    named = [part for name, value in parameters.items() for part in ("--param", f"{name}={value}")]

    started = worker.prefect("deployment", "run", "train/qlora", *named)
    wait_until(lambda: steps_taken(tmp_path) > 0, seconds=300)
    cancel(worker, re.search(r"UUID: ([0-9a-f-]{36})", started)[1])
    wait_until(lambda: saved_step(tmp_path) > 0, seconds=120)
    assert saved_step(tmp_path) < 40

    worker.prefect("deployment", "run", "train/qlora", *named, "--watch")
    [run] = warehouse.names("runs")
    assert warehouse.read_table(f"runs/{run}/metrics.parquet", ["step"])["step"].to_pylist() == list(range(1, 41))


def cancel(server: Server, flow_run: str) -> None:
    """Do what the button in Prefect's pages does."""
    request = urllib.request.Request(
        f"{server.url}/api/flow_runs/{flow_run}/set_state", data=json.dumps({"state": {"type": "CANCELLING"}}).encode()
    )
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert json.load(answer)["status"] == "ACCEPT"


def steps_taken(folder: Path) -> int:
    """Return how many steps have metrics."""
    return sum(path.read_text().count("\n") for path in folder.glob("warehouse/.work/*/metrics.jsonl"))


def saved_step(folder: Path) -> int:
    """Return the last step with a checkpoint that is whole, or 0."""
    whole = folder.glob("warehouse/.work/*/checkpoints/checkpoint-*/complete")
    return max((int(path.parent.name.removeprefix("checkpoint-")) for path in whole), default=0)
