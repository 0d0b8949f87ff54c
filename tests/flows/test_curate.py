from collections import Counter
from pathlib import Path

import pytest

from flows.curate import curate
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.signals import SignalSettings
from tests.tasks.curation.hostile import write_hostile

REPOSITORY = Path(__file__).parents[2]
CLIP = REPOSITORY / "tasks" / "sample_models" / "clip"
POLICY = REPOSITORY / "deployments" / "policies" / "default.yaml"


def test_a_run_on_hostile_rows_ends_completed_and_accounts_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_hostile(tmp_path / "source", outside=tmp_path / "outside")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    warehouse = Warehouse(str(tmp_path / "warehouse"))
    state = curate(
        "hostile",
        str(tmp_path / "source"),
        policy=str(POLICY),
        policy_parameters={"clip_min": -1.0},
        signals=SignalSettings(clip_model=f"local-dir:{CLIP}"),
        warehouse=warehouse.root,
        return_state=True,
    )
    assert state.name == "Completed"
    counts = read_manifest(warehouse, state.result()).counts
    faults = [warehouse.read_table(f"quarantine/hostile/{name}") for name in warehouse.names("quarantine/hostile")]
    in_quarantine = Counter(row["source"]["path"] for table in faults for row in table.to_pylist())
    undecodable = sum(not row.decodes for row in rows)  # these are in the pool as well
    known = 1
    assert counts["samples"] + sum(in_quarantine.values()) - undecodable + known == len(rows)
    assert counts["kept"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"source", "outside", "cwd", "warehouse"}
    assert not list((tmp_path / "cwd").iterdir())
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["secret.jpg"]
