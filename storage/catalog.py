"""The catalog: DuckDB views over everything a warehouse holds, in a connection or in `catalog.duckdb` for any client.

Views only, so the file stays small and never holds data; it is rebuilt after each commit and swapped in whole, so a
client can query it at any time, also while flows are writing.
"""

import re
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import duckdb
import pyarrow as pa

from storage import schema
from storage.record import read_record
from storage.refs import SignalRef, SnapshotRef
from storage.snapshot import FileEntry, Manifest, datasets, numbers, read_manifest
from storage.warehouse import Warehouse, WarehouseError

FILE = "catalog.duckdb"
SQL_FILE = "catalog.sql"
STORAGE_VERSION = "v1.0.0"
"""Storage format of the file, the oldest stable one, so that clients older than this process open it."""


def connect(warehouse: Warehouse) -> duckdb.DuckDBPyConnection:
    """Return a DuckDB connection in memory with the catalog's views.

    The views are samples, quarantine, signals, embeddings, pairs, decisions, curated, documents, document_decisions,
    node_decisions, interleaved, snapshots, differences, document_differences, preflights, runs, evaluations, merges and
    lineage. Decisions and what was published are those of the latest snapshot of each dataset as of this call;
    `signals` has one row a sample with the columns of every signal (the newest measurement of each name; embeddings
    apart).
    """
    connection = duckdb.connect()
    if not warehouse.is_local:
        connection.register_filesystem(warehouse.remote)
    _with_views(warehouse, lambda statements: _execute(connection, statements))
    return connection


def write_catalog(warehouse: Warehouse) -> str:
    """Rebuild the catalog file and swap it in; returns its path in the warehouse.

    Locally `catalog.duckdb`, which `duckdb -readonly catalog.duckdb` opens; on a remote warehouse `catalog.sql`,
    the same views as statements.
    """

    def write(statements: list[str]) -> None:
        if warehouse.is_local:
            with tempfile.TemporaryDirectory(prefix="tamis-") as folder:
                _write_database(Path(folder, FILE), statements)
                warehouse.replace_bytes(FILE, Path(folder, FILE).read_bytes())
        else:
            warehouse.replace_bytes(SQL_FILE, (";\n".join(statements) + ";\n").encode())

    while _with_views(warehouse, write) != view_statements(warehouse):
        pass  # a commit came between: its views must not get lost
    return FILE if warehouse.is_local else SQL_FILE


def view_statements(warehouse: Warehouse) -> list[str]:
    """Return the `CREATE VIEW` statements of the catalog, in the order they depend on each other."""
    manifests = list(_manifests(warehouse))
    newest = {manifest.dataset: manifest for manifest in manifests}.values()
    views = {
        "samples": _folder_view(warehouse, "pools", schema.SAMPLES, {"pool": -2, "shard": -1}),
        "quarantine": _folder_view(warehouse, "quarantine", schema.QUARANTINE, {"pool": -2}),
        "signals": _signals(warehouse),
        "embeddings": _embeddings(warehouse),
        "pairs": _folder_view(warehouse, "pairs", schema.PAIRS, {"kind": -2}),
        "decisions": _of_snapshots(warehouse, [(m, m.decisions) for m in newest], schema.DECISIONS),
        "curated": _of_snapshots(warehouse, [(m, m.curated) for m in newest], schema.CURATED),
        "documents": _folder_view(warehouse, "documents", schema.DOCUMENTS, {"pool": -2, "shard": -1}),
        "document_decisions": _of_snapshots(
            warehouse, [(m, m.document_decisions) for m in newest], schema.DOCUMENT_DECISIONS
        ),
        "node_decisions": _of_snapshots(warehouse, [(m, m.node_decisions) for m in newest], schema.NODE_DECISIONS),
        "interleaved": _of_snapshots(warehouse, [(m, m.documents) for m in newest], schema.INTERLEAVED),
        "snapshots": _snapshots(manifests),
        "differences": _differences(warehouse, [m for m in manifests if not m.document_decisions], schema.DIFFERENCE),
        "document_differences": _differences(
            warehouse, [m for m in manifests if m.document_decisions], schema.DOCUMENT_DIFFERENCE
        ),
        "preflights": _record_view(warehouse, "preflights", "findings.parquet", schema.PREFLIGHTS),
        "runs": _record_view(warehouse, "runs", "run.parquet", schema.RUNS),
        "evaluations": _record_view(warehouse, "evaluations", "evaluation.parquet", schema.EVALUATIONS),
        "merges": _record_view(warehouse, "merges", "merge.parquet", schema.MERGES),
        "lineage": _lineage(warehouse, manifests),
    }
    return [f"CREATE OR REPLACE VIEW {name} AS {query}" for name, query in views.items()]


def current_signals(warehouse: Warehouse) -> list[SignalRef]:
    """Return the newest measurement of each signal, by name."""
    newest: dict[str, tuple[str, str]] = {}
    for folder in warehouse.names("signals"):
        name, _, fingerprint = folder.partition("@")
        record = read_record(warehouse, f"signals/{folder}/signal.json")
        if record is not None:
            newest[name] = max(newest.get(name, ("", "")), (record.created_at, fingerprint))
    return [SignalRef(name, newest[name][1]) for name in sorted(newest)]


def _with_views(warehouse: Warehouse, use: Callable[[list[str]], None]) -> list[str]:
    """Call `use` with the statements and return them; call it again where files they name expired meanwhile."""
    statements = view_statements(warehouse)
    while True:
        try:
            use(statements)
            return statements
        except (duckdb.Error, OSError):
            tried, statements = statements, view_statements(warehouse)
            if statements == tried:
                raise


def _manifests(warehouse: Warehouse) -> Iterator[Manifest]:
    for name in datasets(warehouse):
        for number in numbers(warehouse, name):
            try:
                yield read_manifest(warehouse, SnapshotRef(name, number))
            except WarehouseError:
                if number in numbers(warehouse, name):  # else it expired after it was listed
                    raise


# -- the views --------------------------------------------------------------------------------------------


def _folder_view(warehouse: Warehouse, folder: str, columns: pa.Schema, parts: dict[str, int]) -> str:
    """All Parquet files two levels down, with parts of their path as columns (`kind@fingerprint` gives the kind)."""
    inner = warehouse.names(folder)
    if not any(name.endswith(".parquet") for part in inner for name in warehouse.names(f"{folder}/{part}")):
        return _empty(columns, **dict.fromkeys(parts, "VARCHAR"))
    extra = ", ".join(
        f"split_part(replace(parse_path(filename)[{at}], '.parquet', ''), '@', 1) AS {name}"
        for name, at in parts.items()
    )
    files = _files(warehouse, f"{folder}/*/*.parquet")
    return f"SELECT * EXCLUDE (filename), {extra} FROM read_parquet({files}, filename = true)"


def _signals(warehouse: Warehouse) -> str:
    joins = ""
    for ref in current_signals(warehouse):
        scalars = [c.name for c in _columns(warehouse, ref) if not pa.types.is_nested(c.type)]
        if scalars:
            # a sample can be in several shards, one a pool: one row is enough
            rows = f"SELECT DISTINCT ON (sample_id) {_names(scalars)} FROM {_signal_files(warehouse, ref)}"
            joins += f" LEFT JOIN ({rows}) AS {_name(ref.signal)} USING (sample_id)"
    return f"SELECT * FROM (SELECT DISTINCT sample_id FROM samples){joins}"


def _embeddings(warehouse: Warehouse) -> str:
    for ref in current_signals(warehouse):
        lists = [c.name for c in _columns(warehouse, ref) if pa.types.is_fixed_size_list(c.type)]
        if lists:
            return f"SELECT sample_id, {_names(lists)} FROM {_signal_files(warehouse, ref)}"
    return _empty(pa.schema([schema.SAMPLE_ID]))


def _of_snapshots(warehouse: Warehouse, parts: list[tuple[Manifest, tuple[FileEntry, ...]]], columns: pa.Schema) -> str:
    selects = [
        f"SELECT {_quote(manifest.dataset)} AS dataset, {manifest.number}::BIGINT AS snapshot, * "
        f"FROM read_parquet({_file_list(warehouse, entries)}, union_by_name = true)"
        for manifest, entries in parts
        if entries
    ]
    return " UNION ALL BY NAME ".join(selects) or _empty(columns, dataset="VARCHAR", snapshot="BIGINT")


def _snapshots(manifests: list[Manifest]) -> str:
    selects = [
        f"SELECT {_quote(m.dataset)} AS dataset, {m.number}::BIGINT AS snapshot, "
        f"{m.parent or 'NULL'}::BIGINT AS parent, {_quote(m.pool)} AS pool, "
        f"{_quote(str(m.policy.get('name', '')))} AS policy, "
        f"{sum(entry.rows for entry in (*m.decisions, *m.document_decisions))}::BIGINT AS samples, "
        f"{sum(entry.rows for entry in (*m.curated, *m.documents))}::BIGINT AS kept, {_quote(m.content)} AS content, "
        f"{_quote(m.created_at)} AS created_at, {_quote(m.code_version)} AS code_version"
        for m in manifests
    ]
    numbers_ = dict.fromkeys(("snapshot", "parent", "samples", "kept"), "BIGINT")
    text = dict.fromkeys(("dataset", "pool", "policy", "content", "created_at", "code_version"), "VARCHAR")
    return " UNION ALL ".join(selects) or _nothing({**text, **numbers_})


def _differences(warehouse: Warehouse, manifests: list[Manifest], columns: pa.Schema) -> str:
    selects = [
        f"SELECT {_quote(m.dataset)} AS dataset, {m.number}::BIGINT AS snapshot, * "
        f"FROM read_parquet({_files(warehouse, m.ref.difference)})"
        for m in manifests
        if warehouse.exists(m.ref.difference)
    ]
    return " UNION ALL ".join(selects) or _empty(columns, dataset="VARCHAR", snapshot="BIGINT")


def _record_view(warehouse: Warehouse, folder: str, file: str, columns: pa.Schema) -> str:
    if not any(warehouse.exists(f"{folder}/{name}/{file}") for name in warehouse.names(folder)):
        return _empty(columns)
    return f"SELECT * FROM read_parquet({_files(warehouse, f'{folder}/*/{file}')}, union_by_name = true)"


def _lineage(warehouse: Warehouse, manifests: list[Manifest]) -> str:
    """Every (run, sample it was trained on): from an adapter to its images, and back. Of documents, their images."""
    selects = [
        f"SELECT {_quote(m.dataset)} AS dataset, {m.number}::BIGINT AS snapshot, sample_id AS example_id, sample_id, "
        f"key, source, split FROM read_parquet({_file_list(warehouse, m.curated)})"
        for m in manifests
        if m.curated
    ]
    selects += [
        f"SELECT {_quote(m.dataset)} AS dataset, {m.number}::BIGINT AS snapshot, document_id AS example_id, "
        "node.sample_id, key, source, split "
        f"FROM (SELECT unnest(nodes) AS node, * FROM read_parquet({_file_list(warehouse, m.documents)})) "
        "WHERE node.sample_id IS NOT NULL"
        for m in manifests
        if m.documents
    ]
    if not selects:
        text = ("run_id", "adapter_uri", "dataset", "snapshot", "sample_id", "key", "source", "split")
        return _nothing(dict.fromkeys(text, "VARCHAR"))
    return (
        "SELECT run_id, adapter_uri, dataset, snapshot, sample_id, key, source, split FROM runs "
        f"JOIN ({' UNION ALL '.join(selects)}) USING (dataset, snapshot) "
        f"JOIN ({_record_view(warehouse, 'runs', 'examples.parquet', schema.EXAMPLES)}) USING (run_id, example_id)"
    )


# -- pieces of SQL ----------------------------------------------------------------------------------------


def _signal_files(warehouse: Warehouse, ref: SignalRef) -> str:
    return f"read_parquet({_files(warehouse, f'{ref.folder}/*.parquet')})"


def _columns(warehouse: Warehouse, ref: SignalRef) -> list[pa.Field]:
    tables = [name for name in warehouse.names(ref.folder) if name.endswith(".parquet")]
    if not tables:
        return []
    with warehouse.open_parquet(f"{ref.folder}/{tables[0]}") as parquet:
        return list(parquet.schema_arrow)


def _file_list(warehouse: Warehouse, entries: tuple[FileEntry, ...]) -> str:
    return "[" + ", ".join(_files(warehouse, entry.path) for entry in entries) + "]"


def _files(warehouse: Warehouse, path: str) -> str:
    """Where `path` is, for DuckDB: only wildcards of its own are any, none in the name of the warehouse's folder."""
    return _quote(re.sub(r"([\[*?])", r"[\1]", warehouse.root) + "/" + path)


def _empty(columns: pa.Schema, **extra: str) -> str:
    return _nothing({field.name: _sql_type(field.type) for field in columns} | extra)


def _nothing(kinds: dict[str, str]) -> str:
    return "SELECT " + ", ".join(f"NULL::{kind} AS {_name(name)}" for name, kind in kinds.items()) + " WHERE false"


@cache
def _sql_type(kind: pa.DataType) -> str:
    """DuckDB's own word for an Arrow type, asked from DuckDB."""
    with duckdb.connect() as connection:
        return str(connection.from_arrow(pa.table({"c": pa.array([], kind)})).types[0])


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _name(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _names(identifiers: list[str]) -> str:
    return ", ".join(map(_name, identifiers))


def _write_database(path: Path, statements: list[str]) -> None:
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH {_quote(str(path))} AS catalog (STORAGE_VERSION '{STORAGE_VERSION}')")
        connection.execute("USE catalog")
        _execute(connection, statements)


def _execute(connection: duckdb.DuckDBPyConnection, statements: list[str]) -> None:
    for statement in statements:
        connection.execute(statement)
