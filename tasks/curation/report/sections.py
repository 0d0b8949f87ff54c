"""What the pages of samples and of documents have in common, as values for the templates in `sections.html.jinja`."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import jinja2
import numpy as np
import pyarrow as pa

from storage.schema import QUARANTINE
from storage.warehouse import Warehouse
from tasks.curation.funnel import count_overlap
from tasks.curation.report.charts import histogram
from tasks.curation.report.measured import Measure

MAX_ROWS = 12
MAX_CHANGES = 30
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
    """How many, and how many kept, by one property: rows of (value, all, kept); `what` is the word for them."""

    title: str
    what: str
    rows: tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Faults:
    """What lies in quarantine: how many of each reason, and some with their source; `what` is the word for them."""

    what: str
    total: int
    reasons: tuple[tuple[str, int], ...]
    rows: tuple[dict[str, Any], ...]


def histograms(measures: Iterable[Measure], kept: pa.ChunkedArray, *, what: str) -> list[Histogram]:
    """Return a chart of each measure over all rows; `kept` says which of them are."""
    is_kept = np.asarray(kept)
    charts = []
    for measure in measures:
        finite = measure.values[np.isfinite(measure.values)]
        low, middle, high = np.quantile(finite, [0.05, 0.5, 0.95]) if len(finite) else (np.nan,) * 3
        missing = len(measure.values) - len(finite)
        summary = f"median {middle:.3g}; 90 % of {what} from {low:.3g} to {high:.3g}"
        summary += f"; {missing:,} without a value" if missing else ""
        svg = histogram(f"{measure.sql} of {what}", measure.values, is_kept, measure.lines)
        charts.append(Histogram(measure.sql, measure.conditions, measure.lines, svg, summary))
    return charts


def overlap(failed: pa.ChunkedArray, names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Return rows of the overlap matrix: how many fail both conditions; on the diagonal, only that one."""
    counts = count_overlap(Counter(map(tuple, failed.to_pylist())))
    return [(one, [counts.get((one, other), 0) for other in names]) for one in names]


def breakdowns(rows: pa.Table, *, what: str) -> list[Breakdown]:
    """Return breakdowns by language, format and size, whichever columns `rows` has beside `kept`."""
    found = []
    with duckdb.connect() as connection:
        connection.register("rows", rows)
        for title, (needed, value) in BREAKDOWNS.items():
            if needed in rows.column_names:
                counts = connection.execute(
                    f"SELECT coalesce({value}, 'unknown'), count(*), count(*) FILTER (kept) FROM rows GROUP BY ALL "
                    f"ORDER BY 2 DESC, 1 LIMIT {MAX_ROWS}"
                ).fetchall()
                found.append(Breakdown(title, what, tuple(counts)))
    return found


def faults(pool: str, *, what: str, warehouse: Warehouse) -> Faults:
    """Return what lies in a pool's quarantine."""
    folder = f"quarantine/{pool}"
    columns = ["key", "source", "reason", "detail"]
    files = [f"{folder}/{name}" for name in warehouse.names(folder)]
    rows = warehouse.read_tables(files, QUARANTINE, columns).sort_by([("reason", "ascending"), ("key", "ascending")])
    reasons = sorted(Counter(rows["reason"].to_pylist()).items(), key=lambda item: -item[1])
    return Faults(what, len(rows), tuple(reasons), tuple(rows.slice(0, MAX_FAULTS).to_pylist()))


def render(name: str, content: Mapping[str, Any]) -> str:
    """Return a page: one of the templates beside this file, filled."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tasks.curation.report", "."),
        autoescape=True,  # captions and keys are other people's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name).render(content)
