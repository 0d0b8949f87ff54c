"""Everything the warehouse knows about one sample: what was measured, what it is a duplicate of, and every decision.

A snapshot's conditions are evaluated again on the measurements that snapshot was decided on, so the values stand
beside the thresholds they met.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from storage.catalog import connect
from storage.refs import PoolRef, ShardRef, SignalRef, SnapshotRef
from storage.snapshot import Manifest, datasets, numbers, read_manifest
from storage.warehouse import Warehouse
from tasks.curation.columns import EvidenceError, find_columns
from tasks.curation.conditions import evaluate, locked_connection
from tasks.curation.funnel import with_values
from tasks.curation.policy import Policy, TopFraction

SHOWN_CHARACTERS = 1_000
"""Of a text, in Markdown: an artifact takes no caption of megabytes."""


@dataclass(frozen=True)
class Judgement:
    """How a sample fared under one condition: its SQL, the values it read, and whether the sample passed."""

    condition: str
    sql: str
    values: dict[str, Any]
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """What one snapshot decided; `failed` has all reasons but being a duplicate, `split` is None unless published."""

    snapshot: SnapshotRef
    kept: bool
    failed: tuple[str, ...]
    split: str | None
    judgements: tuple[Judgement, ...]
    duplicate_of: str | None
    duplicate_rule: str | None
    duplicate_distance: float | None
    contaminated_by: str | None


@dataclass(frozen=True)
class Explanation:
    """A sample with its image, measurements, pairs (kind, other sample's id and key, distance), verdicts and runs.

    A sample may lie in several pools, a shard in each; the verdicts are those of all.
    """

    sample_id: str
    pools: tuple[str, ...]
    shards: tuple[str, ...]
    key: str
    caption: str | None
    source: dict[str, str | None]
    image: bytes
    measurements: dict[str, Any]
    pairs: tuple[tuple[str, str, str | None, float], ...]
    verdicts: tuple[Verdict, ...]
    runs: tuple[str, ...]

    def markdown(self) -> str:
        """Return all of it but the image, for a terminal or a Prefect artifact."""
        where = f"{'pool' if len(self.pools) == 1 else 'pools'} {', '.join(self.pools)}"
        lines = [
            f"# {_cell(self.key)}",
            f"`{self.sample_id}` in {where}, from {_cell(self.source['path'])} {_cell(self.source['member'])}",
            "",
            f"> {_cell(self.caption)}",
        ]
        for verdict in self.verdicts:
            lines += ["", f"## {verdict.snapshot}: {_outcome(verdict)}", "", "| | condition | passes if | value |"]
            lines += ["|:--|:--|:--|:--|"]
            for own in verdict.judgements:
                read = [f"{name} = {_cell(value)}" for name, value in own.values.items() if not name.startswith("$")]
                asked = {name.removeprefix("$"): value for name, value in own.values.items() if name.startswith("$")}
                sign = "✓" if own.passed else "✗"
                sql = _code(with_values(own.sql, asked))
                lines.append(f"| {sign} | {own.condition} | `{sql}` | {', '.join(read)} |")
        if self.pairs:
            lines += ["", "## Pairs", "", "| kind | with | distance |", "|:--|:--|--:|"]
            lines += [f"| {kind} | {_cell(key)} `{other}` | {at:.3g} |" for kind, other, key, at in self.pairs]
        if self.runs:
            lines += ["", f"Trained on by {', '.join(f'`{run}`' for run in self.runs)}"]
        lines += ["", "## Measurements", "", "| measured | value |", "|:--|:--|"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in self.measurements.items() if value is not None]
        return "\n".join(lines) + "\n"


def explain(sample_id: str, *, warehouse: Warehouse) -> Explanation:
    """Gather all there is about a sample. Raises `EvidenceError` if no pool holds it."""
    with connect(warehouse) as catalog:

        def rows(query: str) -> list[dict[str, Any]]:
            found = catalog.execute(query, {"id": sample_id})
            names = [column[0] for column in found.description]
            return [dict(zip(names, row, strict=True)) for row in found.fetchall()]

        samples = rows("SELECT * FROM samples WHERE sample_id = $id ORDER BY pool, shard")
        if not samples:
            raise EvidenceError(
                f"{warehouse.root}: no pool holds sample {sample_id!r}. Look it up by its key: "
                "from samples where key = '…'."
            )
        sample = samples[0]
        [measured] = rows("SELECT * FROM signals WHERE sample_id = $id")
        pairs = rows(
            "SELECT DISTINCT kind, other.sample_id AS other, other.key AS key, distance FROM pairs "
            "JOIN (SELECT DISTINCT ON (sample_id) sample_id, key FROM samples) other "
            "ON other.sample_id = CASE WHEN left_id = $id THEN right_id ELSE left_id END "
            "WHERE left_id = $id OR right_id = $id ORDER BY distance, kind, other"
        )
        runs = rows("SELECT DISTINCT run_id FROM lineage WHERE sample_id = $id ORDER BY run_id")
    return Explanation(
        sample_id=sample_id,
        pools=tuple(row["pool"] for row in samples),
        shards=tuple(row["shard"] for row in samples),
        key=sample["key"],
        caption=sample["caption"],
        source=sample["source"],
        image=sample["image"]["bytes"],
        measurements={name: value for name, value in measured.items() if name != "sample_id"},
        pairs=tuple((pair["kind"], pair["other"], pair["key"], pair["distance"]) for pair in pairs),
        verdicts=tuple(_verdicts(sample_id, {row["shard"] for row in samples}, warehouse)),
        runs=tuple(run["run_id"] for run in runs),
    )


def _verdicts(sample_id: str, shards: Collection[str], warehouse: Warehouse) -> Iterator[Verdict]:
    for dataset in datasets(warehouse):
        for number in numbers(warehouse, dataset):
            manifest = read_manifest(warehouse, SnapshotRef(dataset, number))
            for entry in manifest.decisions:
                if entry.pool_shard in shards:
                    own = _row(warehouse.read_table(entry.path), sample_id)
                    judgements = tuple(_judgements(manifest, sample_id, own["failed"], entry.pool_shard, warehouse))
                    yield Verdict(
                        manifest.ref,
                        own["kept"],
                        tuple(own["failed"]),
                        _split(manifest, sample_id, entry.pool_shard, warehouse) if own["kept"] else None,
                        judgements,
                        own["duplicate_of"],
                        own["duplicate_rule"],
                        own["duplicate_distance"],
                        own["contaminated_by"],
                    )


def _judgements(
    manifest: Manifest, sample_id: str, failed: list[str], shard: str, warehouse: Warehouse
) -> Iterator[Judgement]:
    """Each condition of the snapshot's policy, with the values that the snapshot's own signals had."""
    policy = Policy.model_validate(manifest.policy)
    rows = next(entry.rows for entry in manifest.decisions if entry.pool_shard == shard)
    pool = PoolRef(manifest.pool, (ShardRef(manifest.pool, shard, rows),))
    signals = [SignalRef(name, fingerprint) for name, fingerprint in manifest.signals.items()]
    columns = find_columns(pool, signals, warehouse=warehouse)
    checked = policy.check(columns.schema)
    table = columns.read(pool.shards[0], checked.columns, warehouse=warehouse)
    row = table.filter(pc.equal(table["sample_id"], sample_id))
    with locked_connection() as connection:
        for condition, expression in zip(policy.conditions, checked.conditions, strict=True):
            values = {name: row[name][0].as_py() for name in sorted(expression.columns)}
            sql, used = expression.sql, set(expression.parameters)
            if isinstance(condition, TopFraction):
                rank = evaluate(connection, [expression], row, parameters=policy.parameters)["c0"][0].as_py()
                sql, values = f"top {condition.top_fraction} by {condition.of}", {condition.of: rank}
                used |= {str(condition.top_fraction).removeprefix("$")} & policy.parameters.keys()
            parameters = {f"${name}": policy.parameters[name] for name in sorted(used)}
            yield Judgement(condition.name, sql, values | parameters, condition.name not in failed)


def _split(manifest: Manifest, sample_id: str, shard: str, warehouse: Warehouse) -> str:
    [path] = [entry.path for entry in manifest.curated if entry.pool_shard == shard]
    return str(_row(warehouse.read_table(path, ["sample_id", "split"]), sample_id)["split"])


def _row(table: pa.Table, sample_id: str) -> dict[str, Any]:
    [row] = table.filter(pc.equal(table["sample_id"], sample_id)).to_pylist()
    return dict(row)


def _outcome(verdict: Verdict) -> str:
    if verdict.kept:
        return f"kept, {verdict.split}"
    reasons = [f"fails {', '.join(verdict.failed)}"] if verdict.failed else []
    if verdict.contaminated_by:
        reasons.append(f"copy of the evaluation sample `{verdict.contaminated_by}`")
    if verdict.duplicate_of:
        by = f"{verdict.duplicate_rule}, distance {verdict.duplicate_distance:.3g}"
        reasons.append(f"duplicate of `{verdict.duplicate_of}` ({by})")
    return f"rejected: {'; '.join(reasons)}"


def _code(sql: str) -> str:
    return " ".join(sql.split()).replace("|", "\\|").replace("`", "'")


def _cell(value: Any) -> str:
    """A value as text that can't break out of its Markdown cell."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str("" if value is None else value).split())
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}… ({len(text):,} characters)"
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
