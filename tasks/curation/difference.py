"""What a snapshot changed: every sample added or removed since the one before it, and why.

Both snapshots carry all reasons for every sample, so the difference is a join; the policies beside them say whether a
condition changed, and the signals' fingerprints whether a measurement did.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from storage.refs import Outcome, SnapshotRef
from storage.schema import DECISIONS, DIFFERENCE
from storage.snapshot import FileEntry, Manifest, read_manifest
from storage.warehouse import Warehouse
from tasks.curation.funnel import cell
from tasks.curation.policy import SPLIT_CONFLICT

HELD_OUT = {SPLIT_CONFLICT: "its duplicates were held out"}
"""Why a split conflict arises, whatever the policies say."""

COLUMNS = ["sample_id", "kept", "failed", "duplicate_of", "duplicate_rule"]

_CHANGES = """
    WITH changed AS (
        SELECT {by}, coalesce(new.kept, false) AS added,
               old.kept IS NULL AS is_new, new.kept IS NULL AS has_left,
               CASE WHEN new.kept THEN old.failed ELSE new.failed END AS failed,
               CASE WHEN new.kept THEN old.duplicate_of ELSE new.duplicate_of END AS duplicate_of,
               CASE WHEN new.kept THEN old.duplicate_rule ELSE new.duplicate_rule END AS duplicate_rule
        FROM old FULL JOIN new USING ({by})
        WHERE coalesce(old.kept, false) <> coalesce(new.kept, false)
    )
    SELECT {by}, CASE WHEN added THEN 'added' ELSE 'removed' END AS change,
           CASE WHEN is_new THEN 'new_{what}' WHEN has_left THEN 'left_pool'
                WHEN len(failed) > 0 THEN 'condition' ELSE 'duplicate' END AS cause,
           coalesce(failed, []) AS failed, duplicate_of, duplicate_rule,
           duplicate_of IN (SELECT {survivor} FROM new ANTI JOIN old USING ({survivor})) AS survivor_is_new,
           duplicate_of NOT IN (SELECT {survivor} FROM new WHERE kept AND {survivor} IS NOT NULL) AS survivor_is_out
    FROM changed
    ORDER BY {by}
"""


def difference(snapshot: SnapshotRef, *, warehouse: Warehouse) -> Outcome[str]:
    """Write the rows of `DIFFERENCE` between a snapshot and its parent; returns the table's path.

    For a first snapshot every kept sample was added. Raises `WarehouseError` if the parent has expired meanwhile.
    """
    if warehouse.exists(snapshot.difference):
        return Outcome(snapshot.difference, cached=True)
    new = read_manifest(warehouse, snapshot)
    old = read_manifest(warehouse, SnapshotRef(new.dataset, new.parent)) if new.parent else None
    before, after = (_decisions(manifest.decisions if manifest else (), warehouse) for manifest in (old, new))
    changes = decided_otherwise(before, after, by="sample_id", what="sample")
    because = _because(old, new)
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


def decided_otherwise(old: pa.Table, new: pa.Table, *, by: str, what: str, survivor: str = "sample_id") -> pa.Table:
    """Return a row for each `what` kept in only one of two decision tables, and from which side of `DIFFERENCE`.

    `by` are the columns that name it, `survivor` the one that `duplicate_of` refers to. Beside the columns of
    `DIFFERENCE` there are `survivor_is_new` and `survivor_is_out`, which `Because` reads.
    """
    with duckdb.connect() as connection:
        connection.register("old", old)
        connection.register("new", new)
        return connection.sql(_CHANGES.format(by=by, what=what, survivor=survivor)).to_arrow_table()


@dataclass(frozen=True)
class Because:
    """Says what made a decision come out otherwise.

    `conditions` and `rules` have what changed of each by its name; `otherwise` is the reason where they did not, and
    `taken`, if that is another one, why of some duplicates not the same one survives.
    """

    conditions: Mapping[str, str]
    rules: Mapping[str, str]
    otherwise: str
    taken: str | None = None

    def text(self, row: Mapping[str, Any]) -> str:
        """Return why, for a row of `decided_otherwise`."""
        if row["cause"] not in ("condition", "duplicate"):
            return str(row["cause"]).replace("_", " ")
        if row["cause"] == "duplicate":
            return f"{row['duplicate_rule']}: {self._duplicate(row)}"
        return "; ".join(f"{name}: {self.conditions.get(name, self.otherwise)}" for name in row["failed"])

    def _duplicate(self, row: Mapping[str, Any]) -> str:
        if row["survivor_is_new"]:
            return "its survivor is new"
        if row["survivor_is_out"]:
            return "its survivor was removed"
        return self.rules.get(row["duplicate_rule"], self.taken or self.otherwise)


def changed_entries(before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Return the entries of one kind that are not the same in two policies, by name, with what changed."""
    old, new = _texts(before, kind), _texts(after, kind)
    changed = {name: f"{old[name]} became {new[name]}" for name in old.keys() & new.keys() if old[name] != new[name]}
    changed |= {name: f"no longer asked ({old[name]})" for name in old.keys() - new.keys()}
    return changed | {name: f"newly asked ({new[name]})" for name in new.keys() - old.keys()}


def measured_anew(before: Mapping[str, str], after: Mapping[str, str], *, otherwise: str) -> str:
    """Return which signals have another fingerprint than before, as a reason; `otherwise` if none has."""
    anew = [name for name, fingerprint in after.items() if before.get(name) != fingerprint]
    return f"{', '.join(anew)} measured anew" if anew else otherwise


def _because(old: Manifest | None, new: Manifest) -> Because:
    before, after = old.policy if old else {}, new.policy
    same = "the rest of the pool changed"
    otherwise = measured_anew(old.signals if old else {}, new.signals, otherwise=same)
    preferred, prefers = (_with_values(", ".join(p.get("prefer", ())), p) for p in (before, after))
    taken = otherwise if preferred == prefers else f"prefer {preferred} became {prefers}"
    copied = "the evaluation sets changed" if otherwise == same else otherwise
    conditions = {
        **HELD_OUT,
        **dict.fromkeys(_texts(after, "decontaminate"), copied),
        **dict.fromkeys(_texts(after, "limits"), taken),
    }
    for kind in ("conditions", "decontaminate", "limits"):
        conditions |= changed_entries(before, after, kind)
    return Because(conditions, changed_entries(before, after, "duplicates"), otherwise, taken)


def _texts(policy: Mapping[str, Any], kind: str) -> dict[str, str]:
    """Each entry by name, as text with the parameters' values that it refers to."""
    texts = {}
    for entry in policy.get(kind, ()):
        text = ", ".join(str(v) if key == "sql" else f"{key} {v}" for key, v in entry.items() if key != "name")
        texts[entry["name"]] = _with_values(text, policy)
    return texts


def _with_values(text: str, policy: Mapping[str, Any]) -> str:
    used = {name: value for name, value in policy.get("parameters", {}).items() if re.search(rf"\${name}\b", text)}
    return text + "".join(f", ${name} = {value}" for name, value in used.items())


def _decisions(entries: Iterable[FileEntry], warehouse: Warehouse) -> pa.Table:
    return warehouse.read_tables([entry.path for entry in entries], DECISIONS, COLUMNS)
