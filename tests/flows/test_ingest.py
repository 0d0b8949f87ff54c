"""Sources as a user gives them to a flow, and what is said where nothing comes of one."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect import Flow
from prefect.exceptions import ParameterTypeError

from flows.compare import compare
from flows.evaluate import evaluate
from flows.ingest import ingest
from flows.pipeline import pipeline
from storage.warehouse import WarehouseError
from tasks.curation.sources.contract import SourceError
from tests.tasks.curation.images import encoded, photograph

POLICY = "deployments/policies/datacomp_basic.yaml"

KEPT_ERROR = """
import builtins
from pathlib import Path
from flows.explain import explain
try:
    explain.fn("unknown", warehouse="nowhere")
except ValueError as error:
    builtins.kept = error  # as Prefect keeps the errors of runs
"""


def write_parquet(folder: Path, **columns: list[object]) -> str:
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return str(folder)


def test_columns_of_unusual_names_are_read_when_the_flow_is_told(tmp_path: Path) -> None:
    source = write_parquet(
        tmp_path / "a",
        front=[encoded(photograph(), "JPEG")],
        back=[encoded(photograph(), "JPEG")],
        words=["a"],
        letters=["b"],
    )
    warehouse = str(tmp_path / "warehouse")
    with pytest.raises(SourceError, match="Give image_column"):
        ingest("pets", source, warehouse)
    pool = ingest("pets", source, warehouse, source_settings={"image_column": "back", "caption_column": "letters"})
    assert pool.rows == 1


def test_a_source_of_which_nothing_can_be_used_is_told_from_one_without_rows(tmp_path: Path) -> None:
    warehouse = str(tmp_path / "warehouse")
    wrong = write_parquet(tmp_path / "wrong", image=[1, 2], caption=["a", "b"])
    with pytest.raises(SourceError, match=r"No row of .*wrong can be used: not_an_image \(2\)"):
        ingest("pets", wrong, warehouse)
    empty = write_parquet(tmp_path / "empty", image=pa.array([], pa.binary()), caption=pa.array([], pa.string()))
    with pytest.raises(SourceError, match="empty has no rows"):
        ingest("cats", empty, warehouse)


def test_the_message_is_the_last_thing_that_a_failed_script_prints(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KEPT_ERROR]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120, check=True
    )
    assert "leaked" not in done.stderr


def test_comparing_policies_on_a_pool_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    warehouse = str(tmp_path / "warehouse")
    ingest("pets", write_parquet(tmp_path / "a", image=[encoded(photograph(), "JPEG")], caption=["a"]), warehouse)
    with pytest.raises(WarehouseError, match=r"there is no pool 'pet' \(pools: pets\)"):
        compare("pet", POLICY, POLICY, signals={"measure": ["size", "caption", "language"]}, warehouse=warehouse)


@pytest.mark.parametrize("flow", [evaluate, pipeline])
def test_answering_no_prompt_is_refused_before_anything_runs(flow: Flow) -> None:
    with pytest.raises(ParameterTypeError, match="limit"):
        flow("pets", limit=0)
