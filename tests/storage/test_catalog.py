import subprocess
import sys
import textwrap
from dataclasses import replace

import duckdb
import pyarrow as pa
import pytest

from storage import catalog, schema
from storage.catalog import FILE, connect, write_catalog
from storage.record import Record, write_record
from storage.refs import RunRef, SnapshotRef
from storage.snapshot import Draft, FileEntry, commit
from storage.warehouse import Warehouse

VIEWS = [
    *("samples", "quarantine", "signals", "embeddings", "pairs", "decisions", "curated", "snapshots", "differences"),
    *("documents", "document_decisions", "node_decisions", "interleaved", "document_differences"),
    *("preflights", "runs", "evaluations", "merges", "lineage"),
]


def sample(key: str) -> dict[str, object]:
    image = {"bytes": b"\xff", "path": f"{key}.jpg"}
    source = {"path": "a.tar", "member": key}
    return {"sample_id": f"id-{key}", "key": key, "image": image, "caption": "a cat", "source": source}


def fill(warehouse: Warehouse) -> None:
    samples = pa.Table.from_pylist([sample("1"), sample("2")], schema=schema.SAMPLES)
    warehouse.write_table("pools/p/shard.parquet", samples)
    embedding = pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float16(), 2))
    clip = {"sample_id": ["id-1", "id-2"], "clip_score": [0.3, 0.1], "image_embedding": embedding}
    warehouse.write_table("signals/clip@f1/shard.parquet", pa.table(clip))
    write_record(warehouse, "signals/clip@f1/signal.json", Record("signal", "f1", {}, {}))
    size = pa.table({"sample_id": ["id-1", "id-2"], "width": pa.array([300, 200], pa.int32())})
    warehouse.write_table("signals/size@f2/shard.parquet", size)
    write_record(warehouse, "signals/size@f2/signal.json", Record("signal", "f2", {}, {}))
    pairs = {"left_id": ["id-1"], "right_id": ["id-2"], "distance": [2.0]}
    warehouse.write_table("pairs/perceptual@f3/x.parquet", pa.table(pairs).cast(schema.PAIRS))
    curated = samples.slice(0, 1).append_column(schema.SPLIT, pa.array(["train"]))
    warehouse.write_table("snapshots/d/curated/c.parquet", curated)
    rows = [
        {"sample_id": "id-1", "kept": True, "failed": []},
        {"sample_id": "id-2", "kept": False, "failed": ["clip"], "duplicate_of": "id-1"},
    ]
    decisions = pa.Table.from_pylist(rows, schema=schema.DECISIONS)
    warehouse.write_table("snapshots/d/decisions/d.parquet", decisions)
    commit(warehouse, "d", lambda parent: DRAFT)
    run = pa.Table.from_pylist([{"run_id": "r", "dataset": "d", "snapshot": 1}], schema=schema.RUNS)
    warehouse.write_table(RunRef("r").table, run)
    examples = pa.table({"run_id": ["r"], "example_id": ["id-1"]}, schema=schema.EXAMPLES)
    warehouse.write_table(RunRef("r").examples, examples)


DRAFT = Draft(
    pool="p",
    pool_shards=("shard",),
    policy={"name": "default"},
    signals={"clip": "f1"},
    pairs={"perceptual": "f3"},
    decisions=(FileEntry("snapshots/d/decisions/d.parquet", 2, 1, "", "shard"),),
    curated=(FileEntry("snapshots/d/curated/c.parquet", 1, 1, "", "shard"),),
    published=None,
    counts={},
)


@pytest.mark.parametrize("view", VIEWS)
def test_every_view_answers_on_an_empty_warehouse(tmp_path, view: str) -> None:
    assert connect(Warehouse(str(tmp_path))).execute(f"SELECT * FROM {view}").fetchall() == []


def test_empty_views_have_the_columns_of_full_ones(tmp_path) -> None:
    full = Warehouse(str(tmp_path / "full"))
    fill(full)
    for view in ("samples", "pairs", "decisions", "curated", "snapshots", "runs", "lineage"):
        columns = [
            {d[0]: str(d[1]) for d in connect(w).execute(f"SELECT * FROM {view} LIMIT 0").description}
            for w in (Warehouse(str(tmp_path / "empty")), full)
        ]
        assert set(columns[0]) == set(columns[1]), view


def test_views_join_what_the_warehouse_holds(warehouse: Warehouse) -> None:
    fill(warehouse)
    catalog = connect(warehouse)
    assert catalog.execute("SELECT key, pool, shard FROM samples ORDER BY key").fetchall() == [
        ("1", "p", "shard"),
        ("2", "p", "shard"),
    ]
    assert catalog.execute("SELECT sample_id, round(clip_score, 1), width FROM signals ORDER BY 1").fetchall() == [
        ("id-1", 0.3, 300),
        ("id-2", 0.1, 200),
    ]
    assert catalog.execute("SELECT kind, left_id, right_id, distance FROM pairs").fetchall() == [
        ("perceptual", "id-1", "id-2", 2.0)
    ]
    assert catalog.execute("SELECT dataset, snapshot, key, split FROM curated").fetchall() == [("d", 1, "1", "train")]
    assert catalog.execute("SELECT failed, duplicate_of FROM decisions WHERE NOT kept").fetchall() == [
        (["clip"], "id-1")
    ]
    assert catalog.execute("SELECT run_id, sample_id FROM lineage").fetchall() == [("r", "id-1")]
    assert catalog.execute("SELECT dataset, snapshot, samples, kept, policy FROM snapshots").fetchall() == [
        ("d", 1, 2, 1, "default")
    ]
    similarity = "array_cosine_similarity(image_embedding::FLOAT[2], [1.0, 0.0]::FLOAT[2])"
    assert catalog.execute(f"SELECT {similarity} FROM embeddings ORDER BY 1").fetchall() == [(0.0,), (1.0,)]


def test_curated_shows_the_latest_snapshot_and_lineage_the_one_trained_on(tmp_path) -> None:
    warehouse = Warehouse(str(tmp_path))
    fill(warehouse)
    commit(warehouse, "d", lambda parent: replace(DRAFT, curated=()))
    catalog = connect(warehouse)
    assert catalog.execute("SELECT * FROM curated").fetchall() == []
    assert catalog.execute("SELECT run_id, snapshot, sample_id FROM lineage").fetchall() == [("r", 1, "id-1")]


def test_lineage_leaves_out_what_a_run_could_not_use(tmp_path) -> None:
    warehouse = Warehouse(str(tmp_path))
    fill(warehouse)
    run = pa.Table.from_pylist([{"run_id": "s", "dataset": "d", "snapshot": 1}], schema=schema.RUNS)
    warehouse.write_table(RunRef("s").table, run)
    warehouse.write_table(RunRef("s").examples, schema.EXAMPLES.empty_table())
    assert connect(warehouse).execute("SELECT DISTINCT run_id FROM lineage").fetchall() == [("r",)]


def test_the_file_opens_read_only_elsewhere_while_it_is_rebuilt(tmp_path) -> None:
    warehouse = Warehouse(str(tmp_path))
    fill(warehouse)
    write_catalog(warehouse)
    reader = textwrap.dedent(
        """
        import duckdb, sys
        with duckdb.connect(sys.argv[1], read_only=True) as catalog:
            print("open", flush=True)
            sys.stdin.readline()
            print(catalog.execute("SELECT count(*) FROM curated").fetchall(), flush=True)
        """
    )
    command = [sys.executable, "-c", reader, str(tmp_path / FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "open\n"
        commit(warehouse, "d", lambda parent: replace(DRAFT, curated=()))
        write_catalog(warehouse)
        assert child.communicate("\n")[0] == "[(1,)]\n"
    with duckdb.connect(str(tmp_path / FILE), read_only=True) as catalog:
        assert catalog.execute("SELECT count(*) FROM curated").fetchall() == [(0,)]


@pytest.fixture
def superseded(tmp_path) -> tuple[Warehouse, SnapshotRef]:
    """A warehouse, and the older of its two snapshots."""
    warehouse = Warehouse(str(tmp_path))
    fill(warehouse)
    commit(warehouse, "d", lambda parent: replace(DRAFT, counts={"kept": 0}))
    old = SnapshotRef("d", 1)
    warehouse.write_table(old.difference, schema.DIFFERENCE.empty_table())
    return warehouse, old


@pytest.mark.parametrize("use", [connect, write_catalog])
def test_files_that_expire_while_the_catalog_is_made_are_left_out(superseded, monkeypatch, use) -> None:
    warehouse, old = superseded
    real = catalog.view_statements

    def then_expire(warehouse: Warehouse) -> list[str]:
        statements = real(warehouse)
        for path in (old.manifest, old.difference):
            warehouse.remove(path)
        return statements

    monkeypatch.setattr(catalog, "view_statements", then_expire)
    use(warehouse)
    with connect(warehouse) as views:
        assert views.execute("SELECT snapshot FROM snapshots").fetchall() == [(2,)]


def test_a_snapshot_that_expires_after_it_was_listed_is_left_out(superseded, monkeypatch) -> None:
    warehouse, old = superseded
    warehouse.remove(old.manifest)
    listings = iter([[1, 2], [2]])
    monkeypatch.setattr(catalog, "numbers", lambda *_: next(listings))
    with connect(warehouse) as views:
        assert views.execute("SELECT snapshot FROM snapshots").fetchall() == [(2,)]


def test_names_with_quotes_do_not_break_the_views(tmp_path) -> None:
    warehouse = Warehouse(str(tmp_path / "it's"))
    fill(warehouse)
    assert connect(warehouse).execute("SELECT count(*) FROM samples").fetchall() == [(2,)]


@pytest.mark.parametrize("folder", ["run [3]", "a*b", "a?b"])
def test_a_folder_with_wildcards_in_its_name_is_itself_alone(tmp_path, folder: str) -> None:
    for name in (folder, "axb", "run 3"):
        fill(Warehouse(str(tmp_path / name)))
    warehouse = Warehouse(str(tmp_path / folder))
    write_catalog(warehouse)
    with connect(warehouse) as catalog:
        counts = [catalog.execute(f"SELECT count(*) FROM {view}").fetchall()[0][0] for view in VIEWS[:8]]
    assert counts == [2, 0, 2, 2, 1, 2, 1, 1]


def test_a_remote_warehouse_gets_the_views_as_statements(s3_warehouse: Warehouse) -> None:
    fill(s3_warehouse)
    assert write_catalog(s3_warehouse) == "catalog.sql"
    assert b"CREATE OR REPLACE VIEW curated AS" in s3_warehouse.read_bytes("catalog.sql")
