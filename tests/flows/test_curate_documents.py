"""The flow from documents on disk to a published snapshot, twice."""

from pathlib import Path
from typing import Any

import pytest
from prefect.artifacts import Artifact

from flows.curate_documents import curate_documents
from storage.catalog import connect
from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.curation.conditions import PolicyError
from tasks.curation.sample_documents import write_sample_documents
from tasks.curation.signals import SignalSettings

ROOT = Path(__file__).parents[2]
CLIP = f"local-dir:{ROOT / 'tasks' / 'sample_models' / 'clip'}"
DOCUMENTS = ROOT / "deployments" / "policies" / "documents"


def settings(*measure: str) -> SignalSettings:
    return SignalSettings.model_validate({"measure": measure, "clip_model": CLIP})


def run(folder: Path, policy: str, **options: Any) -> tuple[str, list[tuple[Any, ...]]]:
    """Curate the documents in `folder`; returns the snapshot's name, and what is in it."""
    warehouse = str(folder / "warehouse")
    snapshot = curate_documents(
        "pages", source=str(folder / "source"), policy=str(DOCUMENTS / f"{policy}.yaml"), warehouse=warehouse, **options
    )
    with connect(Warehouse(warehouse)) as catalog:
        rows = catalog.execute("SELECT key, images, texts, split FROM interleaved ORDER BY key").fetchall()
    return str(snapshot), rows


def test_obelics_documents_are_curated_and_a_second_run_publishes_nothing(tmp_path: Path) -> None:
    planted = write_sample_documents(tmp_path / "source", documents=18, shape="obelics")
    options = {
        "signals": settings("size", "characters", "words", "language"),
        "policy_parameters": {"repetition_max": 1},
    }
    name, rows = run(tmp_path, "obelics", **options)
    assert name == "pages@1"
    assert [key for key, *_ in rows] == [d.key for d in planted if d.fault not in ("foreign", "no_images")]
    assert run(tmp_path, "obelics", **options) == (name, rows)
    warehouse = Warehouse(str(tmp_path / "warehouse"))
    report = Artifact.get("report-pages")
    assert report is not None
    assert f"[Report on pages@1: {warehouse.uri(SnapshotRef('pages', 1).report)}]" in str(report.data)
    page = warehouse.read_bytes(SnapshotRef("pages", 1).report).decode()
    assert f"keeps <strong>{len(rows)}</strong> of 18 documents" in page


def test_mmc4_documents_are_curated_with_their_images_before_their_sentences(tmp_path: Path) -> None:
    planted = write_sample_documents(tmp_path / "source", documents=6)
    signals = settings("size", "caption", "clip", "nsfw")
    name, rows = run(tmp_path, "mmc4", signals=signals, policy_parameters={"similarity_min": -1})
    assert name == "pages@1"
    assert {key for key, *_ in rows} == {d.key for d in planted if d.fault != "no_images"}
    assert all(texts[-1] is not None for _, _, texts, _ in rows)
    moved, other = run(tmp_path, "mmc4", signals=signals, policy_parameters={"similarity_min": -1}, order="dom")
    assert moved == "pages@2"
    assert all(texts[-1] is None for key, _, texts, _ in other if planted[0].key == key)
    with connect(Warehouse(str(tmp_path / "warehouse"))) as catalog:
        query = "SELECT change, cause, because FROM document_differences WHERE snapshot = 2 AND key = ?"
        found = catalog.execute(query, [planted[0].key]).fetchall()
    assert found == [("changed", "order", "order: matched became dom")]
    difference = Artifact.get("difference-pages")
    assert difference is not None
    assert "| changed | order: matched became dom" in str(difference.data)


def test_a_policy_that_needs_what_is_not_measured_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_sample_documents(tmp_path / "source", documents=1)
    with pytest.raises(PolicyError, match=r"mmc4.yaml compares images with texts, which needs clip"):
        run(tmp_path, "mmc4", signals=settings("size", "nsfw"))
    assert not (tmp_path / "warehouse" / "documents").exists()
