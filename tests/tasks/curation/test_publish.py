"""Snapshots over small pools written by hand."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from storage import snapshot
from storage.catalog import connect
from storage.fingerprint import file_digest
from storage.refs import SnapshotRef
from storage.schema import CURATED, DECISIONS
from storage.warehouse import Warehouse
from tasks.curation.columns import EvidenceError
from tasks.curation.decide import decide
from tasks.curation.policy import Policy
from tasks.curation.publish import publish
from tests.tasks.curation.handmade import SIGNALS, files, write_pairs, write_pool, write_signals

POLICY = Policy.model_validate(
    {
        "name": "p",
        "parameters": {"least": 0.28},
        "conditions": {"clip": "clip_score >= $least"},
        "duplicates": {"exact": ["bytes"]},
        "splits": {"validation": 0.3, "test": 0.3},
    }
)


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def curate(warehouse, shards, *, policy=POLICY, pairs=(), **settings):
    """Decide and publish; returns the outcome."""
    pool = write_pool(warehouse, *shards)
    signals = write_signals(warehouse, pool, {sample: row for shard in shards for sample, row in shard.items()})
    evidence = [write_pairs(warehouse, "bytes", [(*pair, 0) for pair in pairs])]
    decisions = decide(pool, policy, signals, evidence, warehouse=warehouse).ref
    return publish("set", pool, decisions, policy, signals, evidence, warehouse=warehouse, **settings)


def manifest_of(warehouse, ref: SnapshotRef) -> snapshot.Manifest:
    return snapshot.read_manifest(warehouse, ref)


def curated(warehouse, ref: SnapshotRef) -> dict[str, dict]:
    entries = manifest_of(warehouse, ref).curated
    return {row["sample_id"]: row for entry in entries for row in warehouse.read_table(entry.path).to_pylist()}


def shard_of(begin: int, end: int, **row) -> dict[str, dict]:
    return {f"s{at:03}": row for at in range(begin, end)}


def test_a_snapshot_holds_the_kept_samples_with_their_split_and_scalar_signals(warehouse):
    outcome = curate(warehouse, [{"a": {}, "low": {"clip_score": 0.1}, "b": {}}], pairs=[("a", "b")])
    (entry,) = manifest_of(warehouse, outcome.ref).curated
    table = warehouse.read_table(entry.path)
    scalars = [name for columns in SIGNALS.values() for name, kind in columns.items() if not pa.types.is_nested(kind)]
    assert table.column_names == [*CURATED.names, *scalars]
    assert table.schema.field("clip_score").metadata[b"description"] == b"what clip_score is"
    (row,) = table.to_pylist()
    assert (row["sample_id"], row["image"]["bytes"], row["width"]) == ("a", b"image of a", 640)
    assert row["split"] in ("train", "validation", "test")
    assert (entry.rows, entry.bytes) == (1, warehouse.local_path(entry.path).stat().st_size)
    assert entry.sha256 == file_digest(warehouse.local_path(entry.path))


def test_a_snapshot_says_what_was_decided_on_every_sample(warehouse):
    outcome = curate(warehouse, [{"a": {}, "low": {"clip_score": 0.1}}, {"b": {}}], pairs=[("a", "b")])
    manifest = manifest_of(warehouse, outcome.ref)
    rows = [row for entry in manifest.decisions for row in warehouse.read_table(entry.path).to_pylist()]
    assert {row["sample_id"]: (row["kept"], row["failed"], row["duplicate_of"]) for row in rows} == {
        "a": (True, [], None),
        "low": (False, ["clip"], None),
        "b": (False, [], "a"),
    }
    assert (manifest.counts["samples"], manifest.counts["kept"], manifest.counts["fails.clip"]) == (3, 1, 1)
    assert sum(manifest.counts[split] for split in ("train", "validation", "test")) == 1
    assert manifest.policy["parameters"] == {"least": 0.28}


def test_a_shard_without_kept_samples_has_no_file(warehouse):
    outcome = curate(warehouse, [shard_of(0, 3), shard_of(3, 6, clip_score=0.0)])
    manifest = manifest_of(warehouse, outcome.ref)
    assert (len(manifest.curated), len(manifest.decisions)) == (1, 2)


def test_nothing_kept_is_a_snapshot_too(warehouse):
    outcome = curate(warehouse, [shard_of(0, 3, clip_score=0.0)])
    assert (manifest_of(warehouse, outcome.ref).curated, manifest_of(warehouse, outcome.ref).published) == ((), None)


def test_publishing_the_same_again_is_cached(warehouse):
    first = curate(warehouse, [shard_of(0, 20)])
    before = files(warehouse, "snapshots")
    again = curate(warehouse, [shard_of(0, 20)])
    assert (again.ref, first.cached, again.cached) == (first.ref, False, True)
    assert files(warehouse, "snapshots") == before


def test_unchanged_shards_are_shared_and_changed_ones_are_new(warehouse):
    shards = [shard_of(0, 10), {**shard_of(10, 20), "s019": {"clip_score": 0.29}}]
    one = manifest_of(warehouse, curate(warehouse, shards).ref)
    two = manifest_of(warehouse, curate(warehouse, shards, policy=POLICY.with_parameters({"least": 0.295})).ref)
    assert (two.number, two.parent) == (2, 1)
    shared = {entry.path for entry in one.curated} & {entry.path for entry in two.curated}
    assert len(shared) == 1
    assert {entry.path for entry in one.decisions} & {entry.path for entry in two.decisions} != set()
    assert "s019" in curated(warehouse, one.ref)  # the old snapshot still reads
    assert "s019" not in curated(warehouse, two.ref)


def test_held_out_samples_stay_held_out_for_ever(warehouse):
    first = curate(warehouse, [shard_of(0, 60)])
    held_out = {k: row["split"] for k, row in curated(warehouse, first.ref).items() if row["split"] != "train"}
    assert 20 < len(held_out) < 52
    # all of them are rejected for a while, and come back under a policy that holds out nothing
    curate(warehouse, [shard_of(0, 60)], policy=POLICY.with_parameters({"least": 0.9}))
    lenient = POLICY.model_copy(update={"splits": POLICY.splits.model_copy(update={"validation": 0.0, "test": 0.0})})
    last = curate(warehouse, [shard_of(0, 60)], policy=lenient)
    assert last.ref.number == 3
    assert {k: row["split"] for k, row in curated(warehouse, last.ref).items() if row["split"] != "train"} == held_out


def test_samples_stay_in_their_splits_when_old_snapshots_were_expired(warehouse):
    first = curate(warehouse, [shard_of(0, 60)])
    splits = {k: row["split"] for k, row in curated(warehouse, first.ref).items()}
    curate(warehouse, [shard_of(0, 60)], policy=POLICY.with_parameters({"least": 0.9}))
    warehouse.local_path(first.ref.manifest).unlink()
    other = POLICY.model_copy(update={"splits": POLICY.splits.model_copy(update={"seed": 7})})
    last = curated(warehouse, curate(warehouse, [shard_of(0, 60)], policy=other).ref)
    assert {k: row["split"] for k, row in last.items()} == splits


def test_train_samples_that_come_back_stay_in_train(warehouse):
    first = curate(warehouse, [shard_of(0, 60)])
    trained = {k for k, row in curated(warehouse, first.ref).items() if row["split"] == "train"}
    curate(warehouse, [shard_of(0, 60)], policy=POLICY.with_parameters({"least": 0.9}))
    other = POLICY.model_copy(update={"splits": POLICY.splits.model_copy(update={"seed": 7})})
    last = curated(warehouse, curate(warehouse, [shard_of(0, 60)], policy=other).ref)
    assert {k for k, row in last.items() if row["split"] == "train"} == trained


def test_a_new_better_copy_of_a_test_sample_is_a_test_sample(warehouse):
    first = curated(warehouse, curate(warehouse, [shard_of(0, 60)]).ref)
    policy = POLICY.model_copy(update={"prefer": ("clip_score desc",)})
    copies = {f"z{k}": {"clip_score": 0.9} for k in first}
    shards = [shard_of(0, 60), copies]
    last = curated(warehouse, curate(warehouse, shards, policy=policy, pairs=[(k, f"z{k}") for k in first]).ref)
    assert {k: row["split"] for k, row in last.items()} == {f"z{k}": row["split"] for k, row in first.items()}


def test_a_sample_whose_group_is_now_held_out_leaves_and_its_decision_says_why(warehouse):
    first = curated(warehouse, curate(warehouse, [shard_of(0, 60)]).ref)
    trained = next(k for k, row in first.items() if row["split"] == "train")
    tested = next(k for k, row in first.items() if row["split"] == "test")
    # an image like both arrives; the policy keeps all three, for it has no rule on such pairs
    lenient = POLICY.model_copy(update={"duplicates": ()})
    shards = [shard_of(0, 60), {"x": {}}]
    outcome = curate(warehouse, shards, policy=lenient, pairs=[(trained, "x"), (tested, "x")])
    last = curated(warehouse, outcome.ref)
    assert (trained in last, last[tested]["split"], last["x"]["split"]) == (False, "test", "test")
    manifest = manifest_of(warehouse, outcome.ref)
    rows = [row for entry in manifest.decisions for row in warehouse.read_table(entry.path).to_pylist()]
    assert {row["sample_id"]: row["failed"] for row in rows if not row["kept"]} == {trained: ["split_conflict"]}
    assert manifest.counts["split_conflict"] == 1
    assert all(warehouse.read_table(entry.path).schema.equals(DECISIONS) for entry in manifest.decisions)


def test_a_publication_that_died_is_finished_by_the_next_with_the_same_bytes(warehouse, tmp_path, monkeypatch):
    shards = [shard_of(begin, begin + 5) for begin in range(0, 30, 5)]
    calm = Warehouse(str(tmp_path / "calm"))
    curate(calm, shards)
    written = 0
    build = Warehouse.building

    def dies_at_the_tenth(self, path):
        nonlocal written
        written += path.startswith("snapshots/")
        if written == 10:
            raise KeyboardInterrupt
        return build(self, path)

    disturbed = Warehouse(str(tmp_path / "disturbed"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Warehouse, "building", dies_at_the_tenth)
        curate(disturbed, shards)
    assert snapshot.numbers(disturbed, "set") == []
    assert curate(disturbed, shards).ref.number == 1
    expected, found = files(calm, "snapshots"), files(disturbed, "snapshots")
    assert [path for path in expected if "manifests" not in path] == [path for path in found if "manifests" not in path]
    assert all(found[path] == expected[path] for path in expected if "manifests" not in path)
    assert snapshot.latest(calm, "set").content == snapshot.latest(disturbed, "set").content


def test_publications_at_once_all_finish_numbered_in_some_order(warehouse):
    shards = [shard_of(0, 30, clip_score=0.5)]
    policies = [POLICY.with_parameters({"least": least}) for least in (0.1, 0.2, 0.3, 0.4)]
    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(lambda policy: curate(warehouse, shards, policy=policy), policies))
    assert sorted(outcome.ref.number for outcome in outcomes) == [1, 2, 3, 4]
    splits = [{k: row["split"] for k, row in curated(warehouse, outcome.ref).items()} for outcome in outcomes]
    assert all(found == splits[0] for found in splits)


def test_the_same_publication_twice_at_once_is_one_snapshot(warehouse):
    with ThreadPoolExecutor(2) as threads:
        outcomes = list(threads.map(lambda _: curate(warehouse, [shard_of(0, 30)]), range(2)))
    assert {outcome.ref.number for outcome in outcomes} == {1}
    assert sorted(outcome.cached for outcome in outcomes) == [False, True]


def test_large_shards_are_copied_row_group_by_row_group(warehouse, monkeypatch):
    monkeypatch.setattr("tasks.curation.snapshot_files.ROW_GROUP_BYTES", 1000)
    monkeypatch.setattr("storage.warehouse.ROW_GROUP_BYTES", 1000)
    rows = {k: {"clip_score": 0.3 if at % 3 else 0.1, "width": at} for at, k in enumerate(shard_of(0, 100))}
    outcome = curate(warehouse, [rows])
    (entry,) = manifest_of(warehouse, outcome.ref).curated
    with warehouse.open_parquet(entry.path) as parquet:
        assert parquet.num_row_groups > 2
        table = parquet.read()
    assert table["width"].to_pylist() == [at for at in range(100) if at % 3]
    assert table["sample_id"].to_pylist() == [f"s{at:03}" for at in range(100) if at % 3]


def test_decisions_of_other_inputs_are_refused(warehouse):
    pool = write_pool(warehouse, shard_of(0, 3))
    signals = write_signals(warehouse, pool, shard_of(0, 3))
    evidence = [write_pairs(warehouse, "bytes", [])]
    ref = decide(pool, POLICY, signals, evidence, warehouse=warehouse).ref
    other = POLICY.with_parameters({"least": 0.5})
    with pytest.raises(EvidenceError, match="does not hold the decisions of policy p on pool pool"):
        publish("set", pool, ref, other, signals, evidence, warehouse=warehouse)


def test_the_catalog_shows_what_was_published(warehouse):
    curate(warehouse, [{**shard_of(0, 8), "low": {"clip_score": 0.1}}])
    with connect(warehouse) as catalog:
        assert catalog.execute("SELECT count(*), min(clip_score) > 0.2 FROM curated").fetchall() == [(8, True)]
        query = "SELECT sample_id, failed FROM decisions WHERE NOT kept"
        assert catalog.execute(query).fetchall() == [("low", ["clip"])]
