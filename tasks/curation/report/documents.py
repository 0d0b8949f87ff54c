"""The report on a snapshot of documents: gathers what its page shows."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pyarrow.compute as pc

from storage.snapshot import Manifest
from storage.warehouse import Warehouse
from tasks.curation.funnel import Funnel
from tasks.curation.interleaved.difference import changes_of_documents, document_difference
from tasks.curation.interleaved.policy import MISSING
from tasks.curation.report.charts import funnel_chart
from tasks.curation.report.document_measures import read_documents
from tasks.curation.report.document_sheet import per_condition, take_documents
from tasks.curation.report.pictures import SHARDS, Picture, Pictures, take_pictures
from tasks.curation.report.sections import (
    MAX_CHANGES,
    Histogram,
    breakdowns,
    faults,
    histograms,
    overlap,
    render,
)

SECTIONS = (
    *("Funnel", "Measurements", "Overlap", "Breakdowns", "Changes", "Kept", "Rejected", "Texts", "Images"),
    *("Missing", "Quarantine", "Policy"),
)

REASON = "segments.list.element.reason"
"""The column of missing images' reasons, as Parquet names it."""


@dataclass(frozen=True)
class Part:
    """Documents, texts or images: what became of all of them."""

    what: str
    funnel: Funnel
    chart: str
    histograms: list[Histogram]
    overlap: list[tuple[str, list[int]]]


def documents_page(manifest: Manifest, *, warehouse: Warehouse) -> str:
    """Return the report on a snapshot of documents as HTML; its difference is written if it was not yet."""
    found = read_documents(manifest, warehouse=warehouse)
    document_difference(manifest.ref, warehouse=warehouse)
    funnels = {name: Funnel.from_dict(content) for name, content in manifest.funnel.items()}
    rows = {
        "documents": (found.documents, found.of_documents),
        "texts": (found.texts, found.of_texts),
        "images": (found.images.samples, found.images.measures),
    }
    parts = []
    for what, (table, measures) in rows.items():
        funnel = funnels[what]
        names = [stage.name for stage in funnel.conditions if stage.name != MISSING]
        charts = histograms(measures, table["kept"], what=what)
        parts.append(Part(what, funnel, funnel_chart(funnel, what), charts, overlap(table["failed"], names)))
    of_images = [stage.name for stage in (*funnels["images"].conditions, *funnels["images"].limits)]
    of_images = [name for name in of_images if name != MISSING]
    changed, segments = changes_of_documents(manifest.ref, warehouse=warehouse, limit=MAX_CHANGES)
    content = {
        "snapshot": manifest.ref,
        "manifest": manifest,
        "what": "documents",
        "sections": SECTIONS,
        "funnel": funnels["documents"],
        "parts": parts,
        "breakdowns": [
            *breakdowns(found.documents, what="documents"),
            *breakdowns(found.images.samples, what="images"),
        ],
        "changes": changed,
        "segments": [(f"{kind} {change}", because, count) for kind, change, because, count in segments],
        "sheet": take_documents(
            found,
            [stage.name for stage in funnels["documents"].conditions],
            [stage.name for stage in funnels["documents"].duplicates],
            [stage.name for stage in funnels["texts"].conditions],
            warehouse=warehouse,
        ),
        "pictures": _with_places(
            take_pictures(
                found.images, of_images, warehouse=warehouse, most_kept=0, most_rejected=2 * per_condition(of_images)
            ),
            dict(zip(found.documents["document_id"].to_pylist(), found.documents["key"].to_pylist(), strict=True)),
        ),
        "shards": len(found.shards),
        "most_shards": SHARDS,
        "missing": _missing((shard.path for shard in found.shards), warehouse),
        "faults": faults(manifest.pool, what="documents and images", warehouse=warehouse),
    }
    return render("documents.html.jinja", content)


def _with_places(pictures: Pictures, keys: Mapping[str, str]) -> Pictures:
    """The pictures, named by the key of their document and the segment in it; `keys` are by document."""

    def placed(picture: Picture) -> Picture:
        document, _, position = picture.key.partition("#")
        return replace(picture, key=f"{keys[document]}, segment {position}")

    groups = tuple(
        replace(g, survivor=placed(g.survivor), duplicates=tuple((placed(copy), why) for copy, why in g.duplicates))
        for g in pictures.groups
    )
    return replace(
        pictures, rejected={name: tuple(map(placed, row)) for name, row in pictures.rejected.items()}, groups=groups
    )


def _missing(shards: Iterable[str], warehouse: Warehouse) -> list[tuple[str, int]]:
    """How many images of the pool's documents are missing, by reason."""
    counts: Counter[str] = Counter()
    for path in shards:
        with warehouse.open_parquet(path) as file:
            segments = pc.list_flatten(file.read([REASON])["segments"])
        reasons = pc.struct_field(segments, "reason")
        counts.update({row["values"]: row["counts"] for row in pc.value_counts(reasons.drop_null()).to_pylist()})
    return counts.most_common()
