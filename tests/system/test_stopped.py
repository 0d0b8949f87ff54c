"""A training whose flow is told to end saves a checkpoint first, and the next flow run goes on from it."""

import re
import signal
import sys
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
SCRIPT = """
import sys
from flows.train import train
train(dataset="squares", recipe=sys.argv[1], warehouse=sys.argv[2])
"""


@pytest.mark.system
@pytest.mark.timeout(600)
def test_a_terminated_flow_saves_and_the_next_one_goes_on(server: Server, tmp_path: Path) -> None:
    warehouse, _ = publish(tmp_path / "warehouse")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    command = (sys.executable, "-c", SCRIPT, str(recipe), warehouse.root)

    stopped = server.start(*command)
    wait_until(lambda: any(tmp_path.glob("warehouse/.work/*/metrics.jsonl")) or stopped.poll() is not None, seconds=300)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(120) == -signal.SIGTERM
    assert 0 < saved_step(tmp_path) < 40

    assert server.start(*command).wait(300) == 0
    [run] = warehouse.names("runs")
    assert warehouse.read_table(f"runs/{run}/metrics.parquet", ["step"])["step"].to_pylist() == list(range(1, 41))


@pytest.mark.system
@pytest.mark.timeout(600)
def test_a_cancelled_flow_run_saves_too(worker: Server, tmp_path: Path) -> None:
    warehouse, _ = publish(tmp_path / "warehouse")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    parameters = {"dataset": "squares", "recipe": str(tmp_path / "recipe.yaml"), "warehouse": warehouse.root}
    named = [part for name, value in parameters.items() for part in ("--param", f"{name}={value}")]
    started = worker.prefect("deployment", "run", "train/qlora", *named)
    wait_until(lambda: any(tmp_path.glob("warehouse/.work/*/metrics.jsonl")), seconds=300)
    worker.prefect("flow-run", "cancel", re.search(r"UUID: ([0-9a-f-]{36})", started)[1])
    wait_until(lambda: saved_step(tmp_path) > 0, seconds=120)
    assert saved_step(tmp_path) < 40


def saved_step(folder: Path) -> int:
    """Return the step of the only checkpoint that is whole, or 0."""
    whole = list(folder.glob("warehouse/.work/*/checkpoints/checkpoint-*/complete"))
    return int(whole[-1].parent.name.removeprefix("checkpoint-")) if whole else 0
