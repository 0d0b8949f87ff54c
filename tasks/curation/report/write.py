"""Writes a snapshot's report, of samples or of documents."""

from storage.refs import Outcome, SnapshotRef
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.report.documents import documents_page
from tasks.curation.report.samples import samples_page


def write_report(snapshot: SnapshotRef, *, warehouse: Warehouse) -> Outcome[str]:
    """Write the snapshot's report as one HTML file that needs nothing else; returns its path in the warehouse."""
    if warehouse.exists(snapshot.report):
        return Outcome(snapshot.report, cached=True)
    manifest = read_manifest(warehouse, snapshot)
    page = documents_page if manifest.document_decisions else samples_page
    warehouse.create_bytes(snapshot.report, page(manifest, warehouse=warehouse).encode())
    return Outcome(snapshot.report, cached=False)
