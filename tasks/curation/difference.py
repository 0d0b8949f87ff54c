"""What a snapshot changed: every sample added or removed since the one before it, and why.

Both snapshots carry all reasons for every sample, so the difference is a join; the policies beside them say whether a
condition changed, and the signals' fingerprints whether a measurement did.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import duckdb
import pyarrow as pa

from storage.refs import Outcome, SnapshotRef
from storage.schema import DECISIONS, DIFFERENCE
from storage.snapshot import FileEntry, Manifest, read_manifest
from storage.warehouse import Warehouse
from tasks.curation.funnel import cell
from tasks.curation.policy import SPLIT_CONFLICT

COLUMNS = ["sample_id", "kept", "failed", "duplicate_of", "duplicate_rule"]

_CHANGES = """
    WITH changed AS (
        SELECT sample_id, coalesce(new.kept, false) AS added,
               old.sample_id IS NULL AS is_new, new.sample_id IS NULL AS has_left,
               CASE WHEN new.kept THEN old.failed ELSE new.failed END AS failed,
               CASE WHEN new.kept THEN old.duplicate_of ELSE new.duplicate_of END AS duplicate_of,
               CASE WHEN new.kept THEN old.duplicate_rule ELSE new.duplicate_rule END AS duplicate_rule
        FROM old FULL JOIN new USING (sample_id)
        WHERE coalesce(old.kept, false) <> coalesce(new.kept, false)
    )
    SELECT sample_id, CASE WHEN added THEN 'added' ELSE 'removed' END AS change,
           CASE WHEN is_new THEN 'new_sample' WHEN has_left THEN 'left_pool'
                WHEN len(failed) > 0 THEN 'condition' ELSE 'duplicate' END AS cause,
           coalesce(failed, []) AS failed, duplicate_of, duplicate_rule,
           duplicate_of IN (SELECT sample_id FROM new ANTI JOIN old USING (sample_id)) AS survivor_is_new,
           duplicate_of NOT IN (SELECT sample_id FROM new WHERE kept) AS survivor_is_out
    FROM changed
    ORDER BY sample_id
"""


def difference(snapshot: SnapshotRef, *, warehouse: Warehouse) -> Outcome[str]:
    """Write the rows of `DIFFERENCE` between a snapshot and its parent; returns the table's path.

    For a first snapshot every kept sample was added. Raises `WarehouseError` if the parent has expired meanwhile.
    """
    if warehouse.exists(snapshot.difference):
        return Outcome(snapshot.difference, cached=True)
    new = read_manifest(warehouse, snapshot)
    old = read_manifest(warehouse, SnapshotRef(new.dataset, new.parent)) if new.parent else None
    with duckdb.connect() as connection:
        connection.register("old", _decisions(old.decisions if old else (), warehouse))
        connection.register("new", _decisions(new.decisions, warehouse))
        changes = connection.sql(_CHANGES).to_arrow_table()
    because = _Because(old, new)
    texts = [because.text(row) for row in changes.to_pylist()]
    table = changes.select(DIFFERENCE.names[:-1]).append_column("because", pa.array(texts, pa.string()))
    warehouse.write_table(snapshot.difference, table.cast(DIFFERENCE))
    return Outcome(snapshot.difference, cached=False)


def difference_markdown(snapshot: SnapshotRef, *, warehouse: Warehouse) -> str:
    """Return what changed as a Markdown table: samples by change and by why."""
    with duckdb.connect() as connection:
        connection.register("changes", warehouse.read_table(snapshot.difference))
        rows = connection.execute(
            "SELECT change, cause, because, count(*) FROM changes GROUP BY ALL ORDER BY 4 DESC, 1, 2, 3 LIMIT 50"
        ).fetchall()
    since = "since the snapshot before it" if snapshot.number > 1 else "is the first snapshot of its dataset"
    lines = [f"**{snapshot}** {since}", "", "| change | cause | because | samples |"]
    lines += ["|:--|:--|:--|--:|", *(f"| {c} | {cause} | {cell(why)} | {n:,} |" for c, cause, why, n in rows)]
    return "\n".join(lines if rows else [*lines[:2], "Nothing was added or removed."]) + "\n"


class _Because:
    """Says what, between two snapshots, made a sample's decision come out otherwise."""

    def __init__(self, old: Manifest | None, new: Manifest) -> None:
        before, after = old.policy if old else {}, new.policy
        measured = old.signals if old else {}
        anew = [name for name, fingerprint in new.signals.items() if measured.get(name) != fingerprint]
        self._otherwise = f"{', '.join(anew)} measured anew" if anew else "the rest of the pool changed"
        held_out = {SPLIT_CONFLICT: "its duplicates were held out"}
        self._conditions = {**held_out, **_changed_entries(before, after, "conditions")}
        for kind in ("decontaminate", "limits"):
            self._conditions |= _changed_entries(before, after, kind)
        self._rules = _changed_entries(before, after, "duplicates")

    def text(self, row: Mapping[str, Any]) -> str:
        """Return why, for one changed sample."""
        if row["cause"] in ("new_sample", "left_pool"):
            return str(row["cause"]).replace("_", " ")
        if row["cause"] == "duplicate":
            return f"{row['duplicate_rule']}: {self._duplicate(row)}"
        return "; ".join(f"{name}: {self._conditions.get(name, self._otherwise)}" for name in row["failed"])

    def _duplicate(self, row: Mapping[str, Any]) -> str:
        if row["survivor_is_new"]:
            return "its survivor is new"
        if row["survivor_is_out"]:
            return "its survivor was removed"
        return self._rules.get(row["duplicate_rule"], self._otherwise)


def _changed_entries(before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Conditions or rules that are not the same in both policies, with what changed."""
    old, new = _texts(before, kind), _texts(after, kind)
    changed = {name: f"{old[name]} became {new[name]}" for name in old.keys() & new.keys() if old[name] != new[name]}
    changed |= {name: f"no longer asked ({old[name]})" for name in old.keys() - new.keys()}
    return changed | {name: f"newly asked ({new[name]})" for name in new.keys() - old.keys()}


def _texts(policy: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Each entry by name, as text with the parameters' values that it refers to."""
    parameters: Mapping[str, Any] = policy.get("parameters", {})
    texts = {}
    for entry in policy.get(kind, ()):
        text = ", ".join(str(v) if key == "sql" else f"{key} {v}" for key, v in entry.items() if key != "name")
        used = {name: value for name, value in parameters.items() if f"${name}" in text}
        texts[entry["name"]] = text + "".join(f", ${name} = {value}" for name, value in used.items())
    return texts


def _decisions(entries: Iterable[FileEntry], warehouse: Warehouse) -> pa.Table:
    return warehouse.read_tables([entry.path for entry in entries], DECISIONS, COLUMNS)
