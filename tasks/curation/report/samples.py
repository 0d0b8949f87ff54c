"""The report on a snapshot of samples: gathers what its page shows."""

from typing import Any

import duckdb

from storage.snapshot import Manifest
from storage.warehouse import Warehouse
from tasks.curation.difference import difference
from tasks.curation.funnel import Funnel
from tasks.curation.report.charts import funnel_chart
from tasks.curation.report.measured import read_measured
from tasks.curation.report.pictures import SHARDS, take_pictures
from tasks.curation.report.sections import MAX_CHANGES, breakdowns, faults, histograms, overlap, render

SECTIONS = (
    *("Funnel", "Measurements", "Overlap", "Breakdowns", "Balance", "Changes", "Kept", "Rejected"),
    *("Duplicates", "Quarantine", "Policy"),
)


def samples_page(manifest: Manifest, *, warehouse: Warehouse) -> str:
    """Return the report on a snapshot of samples as HTML; its difference is written if it was not yet."""
    measured = read_measured(manifest, warehouse=warehouse)
    difference(manifest.ref, warehouse=warehouse)
    funnel = Funnel.from_dict(manifest.funnel)
    conditions = [stage.name for stage in funnel.conditions]
    rejecting = [*conditions, *(stage.name for stage in funnel.limits)]
    content = {
        "snapshot": manifest.ref,
        "manifest": manifest,
        "what": "samples",
        "sections": [name for name in SECTIONS if name != "Balance" or funnel.concepts],
        "funnel": funnel,
        "funnel_chart": funnel_chart(funnel),
        "histograms": histograms(measured.measures, measured.samples["kept"], what="samples"),
        "overlap": overlap(measured.samples["failed"], conditions),
        "breakdowns": breakdowns(measured.samples, what="samples"),
        "pictures": take_pictures(measured, rejecting, warehouse=warehouse),
        "shards": len(measured.shards),
        "most_shards": SHARDS,
        "changes": _changes(manifest, warehouse),
        "faults": faults(manifest.pool, what="rows", warehouse=warehouse),
    }
    return render("samples.html.jinja", content)


def _changes(manifest: Manifest, warehouse: Warehouse) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        connection.register("changes", warehouse.read_table(manifest.ref.difference))
        return connection.execute(
            f"SELECT change, because, count(*) FROM changes GROUP BY ALL ORDER BY 3 DESC, 1, 2 LIMIT {MAX_CHANGES}"
        ).fetchall()
