"""What a snapshot of documents changed: documents added, removed, or published with other segments, and why.

What a document's images and texts are is part of its identity, so segments only come and go by what is decided on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from storage.refs import Outcome, SnapshotRef
from storage.schema import DOCUMENT_DECISIONS, DOCUMENT_DIFFERENCE, NODE_DECISIONS
from storage.snapshot import Manifest, read_manifest
from storage.warehouse import Warehouse
from tasks.curation.difference import HELD_OUT, Because, changed_entries, decided_otherwise, measured_anew
from tasks.curation.funnel import cell
from tasks.curation.interleaved.policy import UNMATCHED

DOCUMENTS = ["document_id", "key", "kept", "failed", "duplicate_of", "duplicate_rule"]
NODES = ["document_id", "position", "kind", "sample_id", "kept", "failed", "duplicate_of", "duplicate_rule", "place"]
MAX_ROWS = 50

_REORDERED = """
    SELECT document_id FROM old JOIN new USING (document_id, position)
    WHERE old.place IS NOT NULL AND new.place IS NOT NULL
    GROUP BY document_id HAVING list(position ORDER BY old.place) <> list(position ORDER BY new.place)
"""

Row = dict[str, Any]


def document_difference(snapshot: SnapshotRef, *, warehouse: Warehouse) -> Outcome[str]:
    """Write the rows of `DOCUMENT_DIFFERENCE` between a snapshot and its parent; returns the table's path.

    For a first snapshot every kept document was added. Raises `WarehouseError` if the parent has expired meanwhile.
    """
    if warehouse.exists(snapshot.difference):
        return Outcome(snapshot.difference, cached=True)
    new = _Decided.read(read_manifest(warehouse, snapshot), warehouse)
    parent = new.manifest.parent
    old = _Decided.read(read_manifest(warehouse, SnapshotRef(snapshot.dataset, parent)), warehouse) if parent else None
    rows = _Changes(old, new).rows() if old else _first(new)
    rows.sort(key=lambda row: row["document_id"])
    warehouse.write_table(snapshot.difference, pa.Table.from_pylist(rows, DOCUMENT_DIFFERENCE))
    return Outcome(snapshot.difference, cached=False)


def document_difference_markdown(snapshot: SnapshotRef, *, warehouse: Warehouse) -> str:
    """Return what changed as Markdown tables: documents, and segments of those that stayed, by change and by why."""
    documents, segments = changes_of_documents(snapshot, warehouse=warehouse, limit=MAX_ROWS)
    if not documents:
        return f"**{snapshot}** since the snapshot before it\n\nNothing was added, removed or changed.\n"
    lines = [f"**{snapshot}** since the snapshot before it", "", "| change | because | documents |", "|:--|:--|--:|"]
    lines += [f"| {change} | {cell(why)} | {count:,} |" for change, why, count in documents]
    if segments:
        lines += ["", "Of documents published in both:", "", "| change | because | segments |", "|:--|:--|--:|"]
        lines += [f"| {kind} {change} | {cell(why)} | {count:,} |" for kind, change, why, count in segments]
    return "\n".join(lines) + "\n"


def changes_of_documents(
    snapshot: SnapshotRef, *, warehouse: Warehouse, limit: int
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return (change, because, documents) and (kind, change, because, segments), the most frequent first.

    Segments are those of documents that are published in both snapshots.
    """
    with duckdb.connect() as connection:
        connection.register("changes", warehouse.read_table(snapshot.difference))
        documents = connection.execute(
            f"SELECT change, because, count(*) FROM changes GROUP BY ALL ORDER BY 3 DESC, 1, 2 LIMIT {limit}"
        ).fetchall()
        segments = connection.execute(
            "SELECT s.kind, s.change, s.because, count(*) "
            "FROM (SELECT unnest(segments) AS s FROM changes WHERE change = 'changed') "
            f"GROUP BY ALL ORDER BY 4 DESC, 1, 2, 3 LIMIT {limit}"
        ).fetchall()
    return documents, segments


@dataclass(frozen=True)
class _Decided:
    """A snapshot's manifest and its decisions on documents and on segments."""

    manifest: Manifest
    documents: pa.Table
    nodes: pa.Table

    @classmethod
    def read(cls, manifest: Manifest, warehouse: Warehouse) -> "_Decided":
        documents = [entry.path for entry in manifest.document_decisions]
        nodes = [entry.path for entry in manifest.node_decisions]
        return cls(
            manifest,
            warehouse.read_tables(documents, DOCUMENT_DECISIONS, DOCUMENTS),
            warehouse.read_tables(nodes, NODE_DECISIONS, NODES),
        )

    @property
    def published(self) -> dict[str, str]:
        """The keys of the documents that are kept, by document."""
        kept = self.documents.filter(self.documents["kept"])
        return dict(zip(kept["document_id"].to_pylist(), kept["key"].to_pylist(), strict=True))


class _Changes:
    """What two snapshots say differently."""

    def __init__(self, old: _Decided, new: _Decided) -> None:
        self._old, self._new = old, new
        before, after = old.manifest.policy, new.manifest.policy
        signals = [_signals(decided.manifest) for decided in (old, new)]
        of_images, of_texts = ((signals[0][at], signals[1][at]) for at in (0, 1))
        self._documents = Because(
            HELD_OUT | changed_entries(before, after, "documents"),
            _changed_choices(before, after),
            measured_anew(*of_texts, otherwise="the rest of the pool changed"),
        )
        old_images, new_images = _image_policy(before), _image_policy(after)
        self._order = _changed_order(before, after)
        self._images = Because(
            {
                UNMATCHED: self._order or measured_anew(*of_images, otherwise="other images and texts of it stay"),
                **changed_entries(old_images, new_images, "conditions"),
            },
            changed_entries(old_images, new_images, "duplicates"),
            measured_anew(*of_images, otherwise="the rest of the pool changed"),
        )
        self._texts = Because(
            changed_entries(before, after, "texts"), {}, measured_anew(*of_texts, otherwise="it was judged otherwise")
        )

    def rows(self) -> list[Row]:
        """The rows of `DOCUMENT_DIFFERENCE`, in no order."""
        before, after = self._old.published, self._new.published
        keys = before | after
        segments = self._segments()
        rows = []
        decided = decided_otherwise(
            self._old.documents, self._new.documents, by="document_id", what="document", survivor="document_id"
        )
        for row in decided.to_pylist():
            own = segments.pop(row["document_id"], [])
            rows.append(_row(row | {"key": keys[row["document_id"]]}, self._why(row, own), own))
        reordered = self._reordered()
        for name in before.keys() & after.keys() & (segments.keys() | reordered):
            own = segments.get(name, [])
            why = [_of_segments(own)] if own else []
            why += [self._order or "images go to other texts"] if name in reordered else []
            row = {"document_id": name, "key": keys[name], "change": "changed", "cause": "segments" if own else "order"}
            rows.append(_row(row | {"failed": []}, "; ".join(why), own))
        return rows

    def _why(self, row: Row, segments: list[Row]) -> str:
        """Why a document came or went; where its conditions are what they were, because its segments did."""
        if not segments:
            return self._documents.text(row)
        otherwise = f"its segments changed ({_of_segments(segments)})"
        return Because(self._documents.conditions, self._documents.rules, otherwise).text(row)

    def _segments(self) -> dict[str, list[Row]]:
        """By document in both pools, its segments that came or went."""
        decided = decided_otherwise(self._old.nodes, self._new.nodes, by="document_id, position", what="segment")
        found: dict[str, list[Row]] = {}
        with duckdb.connect() as connection:
            connection.register("decided", decided)
            connection.register("nodes", self._new.nodes)
            rows = connection.sql(
                "SELECT decided.*, kind, sample_id FROM decided JOIN nodes USING (document_id, position) "
                "WHERE cause IN ('condition', 'duplicate') ORDER BY document_id, position"
            ).to_arrow_table()
        for row in rows.to_pylist():
            because = self._images if row["kind"] == "image" else self._texts
            segment = {name: row[name] for name in ("position", "kind", "sample_id", "change")}
            found.setdefault(row["document_id"], []).append(segment | {"because": because.text(row)})
        return found

    def _reordered(self) -> set[str]:
        """Documents whose segments in both snapshots stand in another order."""
        with duckdb.connect() as connection:
            connection.register("old", self._old.nodes)
            connection.register("new", self._new.nodes)
            return {name for (name,) in connection.execute(_REORDERED).fetchall()}


def _first(new: _Decided) -> list[Row]:
    """The rows of a first snapshot."""
    row = {"change": "added", "cause": "new_document", "failed": []}
    return [_row(row | {"document_id": name, "key": key}, "new document") for name, key in new.published.items()]


def _row(row: Mapping[str, Any], because: str, segments: list[Row] | None = None) -> Row:
    """A row of `DOCUMENT_DIFFERENCE`."""
    return {name: row.get(name) for name in DOCUMENT_DIFFERENCE.names} | {
        "because": because,
        "segments": segments or [],
    }


def _of_segments(segments: list[Row]) -> str:
    """Why segments came and went, each reason once."""
    return "; ".join(sorted({f"{s['kind']} {s['change']}, {s['because']}" for s in segments}))


def _signals(manifest: Manifest) -> tuple[dict[str, str], dict[str, str]]:
    """Fingerprints of the signals of images, and of those of texts."""
    texts = {name: value for name, value in manifest.signals.items() if name.startswith("texts.")}
    return {name: value for name, value in manifest.signals.items() if name not in texts}, texts


def _image_policy(policy: Mapping[str, Any]) -> dict[str, Any]:
    return {**policy.get("images", {}), "parameters": policy.get("parameters", {})}


def _changed_choices(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Columns of `one_per` that are asked for by one of two policies only."""
    old, new = (policy.get("one_per", ()) for policy in (before, after))
    changed = {name: "no longer asked" for name in old if name not in new}
    return changed | {name: "newly asked" for name in new if name not in old}


def _changed_order(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What changed of how images are placed; empty for nothing."""
    changed = []
    for name in ("order", "similarity_min"):
        old, new = (_value(policy, name) for policy in (before, after))
        changed += [f"{name}: {old} became {new}"] if old != new else []
    return "; ".join(changed)


def _value(policy: Mapping[str, Any], name: str) -> Any:
    """What a policy says under a name, with the value of the parameter that it refers to."""
    said = policy.get(name)
    if isinstance(said, str) and said.startswith("$"):
        said = policy["parameters"].get(said[1:])
    return "none" if said is None else said
