"""Preflight in the train flow: its artifacts, and that a failed one stops the training before it starts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import Artifact

from flows import train as train_flow
from flows.train import train
from storage.refs import Outcome, RunRef
from tasks.training.preflight import step
from tasks.training.preflight.finding import Finding
from tasks.training.preflight.step import PreflightFailed
from tests.tasks.squares import publish

GEMMA = "tasks/sample_models/gemma"
GOOD = Finding("prompt", "8 samples", "ok", "equal", "the prompt of generation")
BAD = Finding("images", "8 samples", "failed", "changes by 0 nats", "a change", "Pass pixel_values on.")
SPANS = [
    {"sample_id": "s1", "text": "<|turn>user\n[63 image tokens]What?\n", "supervised": False},
    {"sample_id": "s1", "text": "red<turn|>", "supervised": True},
]
MODULE = {
    **{"part": "language", "module": "q_proj", "kind": "Linear4bit", "dtype": "4-bit", "four_bit": True, "layers": 60},
    **{"weights": 10**9, "bytes": 5 * 10**8, "adapted": 60, "adapter_weights": 2 * 10**6, "trained_weights": 0},
    "clipping": "",
}


def set_up(monkeypatch: pytest.MonkeyPatch, root: Path, *findings: Finding) -> dict[str, Any]:
    """A snapshot, a recipe, and a child process that finds what is given; returns the flow's arguments."""
    warehouse, snapshot = publish(root / "warehouse")
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": GEMMA, "completion": "caption"}))
    result = {"findings": [asdict(finding) for finding in findings], "modules": [MODULE], "spans": SPANS}
    monkeypatch.setattr(step, "run_child", lambda *_, **__: result)
    return {"dataset": snapshot.dataset, "recipe": str(recipe), "warehouse": warehouse.root}


def artifacts() -> dict[str, Artifact]:
    """The newest artifacts by the first part of their key."""
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/filter", json={"sort": "CREATED_DESC"}).json()
    named = [Artifact.model_validate(artifact) for artifact in reversed(found) if artifact["key"]]
    return {str(artifact.key).partition("-")[0]: artifact for artifact in named}


def test_a_failed_preflight_stops_the_training_and_is_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments = set_up(monkeypatch, tmp_path, GOOD, BAD)
    monkeypatch.setattr(train_flow.fitting, "train", pytest.fail)
    with pytest.raises(PreflightFailed, match=r"changes by 0 nats; wanted: a change\. Pass pixel_values on\."):
        train(**arguments)
    first = json.loads(str(artifacts()["preflight"].data))[0]
    assert (first["status"], first["check"], first["remedy"]) == ("✗ failed", "images", "Pass pixel_values on.")
    assert "- **✗ failed: images**, 8 samples. Measured: `changes by 0 nats`." in str(artifacts()["model"].data)


def test_what_is_learned_and_by_which_layers_is_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = set_up(monkeypatch, tmp_path, GOOD)
    ran: list[str] = []

    def pretend(*_: Any, **__: Any) -> Outcome[RunRef]:
        ran.append("train")
        return Outcome(RunRef("r"), cached=True)

    monkeypatch.setattr(train_flow.fitting, "train", pretend)
    monkeypatch.setattr(train_flow, "report", lambda *_, **__: None)
    assert train(**arguments) == RunRef("r")
    assert ran == ["train"]
    shown = str(artifacts()["model"].data)
    assert "- `<|turn>user↵[63 image tokens]What?↵`\n- **in the loss:** `red<turn|>`" in shown
    assert "| language | q_proj | 60 | Linear4bit 4-bit | 1,000,000,000 | 60 | 2,000,000 | 0 |  |" in shown
