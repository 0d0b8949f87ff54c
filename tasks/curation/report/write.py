"""Writes a snapshot's report: gathers what the page shows and fills the page."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import duckdb
import jinja2
import numpy as np

from storage.refs import Outcome, SnapshotRef
from storage.schema import QUARANTINE
from storage.snapshot import Manifest, read_manifest
from storage.warehouse import Warehouse
from tasks.curation.difference import difference
from tasks.curation.funnel import Funnel, count_overlap
from tasks.curation.report.charts import funnel_chart, histogram
from tasks.curation.report.measured import Measured, read_measured
from tasks.curation.report.pictures import take_pictures

MAX_ROWS = 12
MAX_FAULTS = 20

BREAKDOWNS = {
    "Language": ("language", "language"),
    "Format": ("format", "format"),
    "Shorter side": (
        "width",
        "CASE WHEN least(width, height) < 200 THEN 'under 200 px' WHEN least(width, height) < 400 THEN '200-399 px' "
        "WHEN least(width, height) < 800 THEN '400-799 px' ELSE '800 px and more' END",
    ),
}
"""Title, the column it needs and SQL for the value, of each breakdown."""


def write_report(snapshot: SnapshotRef, *, warehouse: Warehouse) -> Outcome[str]:
    """Write the snapshot's report as one HTML file that needs nothing else; returns its path in the warehouse."""
    if warehouse.exists(snapshot.report):
        return Outcome(snapshot.report, cached=True)
    manifest = read_manifest(warehouse, snapshot)
    measured = read_measured(manifest, warehouse=warehouse)
    difference(snapshot, warehouse=warehouse)
    page = _template().render(
        snapshot=snapshot,
        manifest=manifest,
        funnel=(funnel := Funnel.from_dict(manifest.funnel)),
        funnel_chart=funnel_chart(funnel),
        histograms=_histograms(measured),
        overlap=_overlap(measured, [stage.name for stage in funnel.conditions]),
        breakdowns=_breakdowns(measured),
        pictures=take_pictures(
            measured, [stage.name for stage in (*funnel.conditions, *funnel.limits)], warehouse=warehouse
        ),
        shards=len(measured.shards),
        changes=_changes(snapshot, warehouse),
        faults=_faults(manifest, warehouse),
    )
    warehouse.create_bytes(snapshot.report, page.encode())
    return Outcome(snapshot.report, cached=False)


@dataclass(frozen=True)
class Histogram:
    """One measure as a chart, with the same in words for those who don't see it."""

    measure: str
    conditions: tuple[str, ...]
    lines: tuple[float, ...]
    svg: str
    summary: str


@dataclass(frozen=True)
class Breakdown:
    """Samples and kept samples by one property: rows of (value, samples, kept)."""

    title: str
    rows: tuple[tuple[str, int, int], ...]


def _histograms(measured: Measured) -> list[Histogram]:
    kept = np.asarray(measured.samples["kept"])
    charts = []
    for measure in measured.measures:
        finite = measure.values[np.isfinite(measure.values)]
        low, middle, high = np.quantile(finite, [0.05, 0.5, 0.95]) if len(finite) else (np.nan,) * 3
        missing = len(measure.values) - len(finite)
        summary = f"median {middle:.3g}; 90 % of samples from {low:.3g} to {high:.3g}"
        summary += f"; {missing:,} without a value" if missing else ""
        svg = histogram(measure.sql, measure.values, kept, measure.lines)
        charts.append(Histogram(measure.sql, measure.conditions, measure.lines, svg, summary))
    return charts


def _overlap(measured: Measured, names: list[str]) -> list[tuple[str, list[int]]]:
    """Rows of the overlap matrix: how many samples fail both conditions; on the diagonal, only that one."""
    counts = count_overlap(Counter(map(tuple, measured.samples["failed"].to_pylist())))
    return [(one, [counts.get((one, other), 0) for other in names]) for one in names]


def _breakdowns(measured: Measured) -> list[Breakdown]:
    """By language, format and size, whichever were measured."""
    breakdowns = []
    with duckdb.connect() as connection:
        connection.register("samples", measured.samples)
        for title, (needed, value) in BREAKDOWNS.items():
            if needed in measured.samples.column_names:
                rows = connection.execute(
                    f"SELECT coalesce({value}, 'unknown'), count(*), count(*) FILTER (kept) FROM samples GROUP BY ALL "
                    f"ORDER BY 2 DESC, 1 LIMIT {MAX_ROWS}"
                ).fetchall()
                breakdowns.append(Breakdown(title, tuple(rows)))
    return breakdowns


def _changes(snapshot: SnapshotRef, warehouse: Warehouse) -> list[tuple[Any, ...]]:
    with duckdb.connect() as connection:
        connection.register("changes", warehouse.read_table(snapshot.difference))
        return connection.execute(
            "SELECT change, because, count(*) FROM changes GROUP BY ALL ORDER BY 3 DESC, 1, 2 LIMIT 30"
        ).fetchall()


def _faults(manifest: Manifest, warehouse: Warehouse) -> dict[str, Any]:
    """What lies in quarantine: how many of each reason, and some with their source."""
    folder = f"quarantine/{manifest.pool}"
    columns = ["key", "source", "reason", "detail"]
    files = [f"{folder}/{name}" for name in warehouse.names(folder)]
    rows = warehouse.read_tables(files, QUARANTINE, columns).sort_by([("reason", "ascending"), ("key", "ascending")])
    return {
        "total": len(rows),
        "reasons": sorted(Counter(rows["reason"].to_pylist()).items(), key=lambda item: -item[1]),
        "rows": rows.slice(0, MAX_FAULTS).to_pylist(),
    }


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tasks.curation.report", "."),
        autoescape=True,  # captions and keys are other people's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja")
