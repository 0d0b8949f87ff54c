"""Snapshots of documents: what they hold, that they stay, and that nothing is computed twice."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from storage.catalog import connect
from storage.expire import expire
from storage.schema import INTERLEAVED
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.columns import EvidenceError
from tasks.curation.conditions import PolicyError
from tasks.curation.interleaved.difference import document_difference
from tasks.curation.interleaved.publish import Judged, publish_documents
from tests.tasks.curation.interleaved.chain import Tables, publish, published
from tests.tasks.curation.interleaved.handmade import document, policy, run, run_by_bytes, write


def test_a_published_document_has_its_original_images_and_texts_in_order(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one two", "a.jpg", "gone.jpg", "three", "b.jpg") | {"extra": 5})
    judged = run(warehouse, source)
    snapshot = publish(warehouse, judged)
    (row,) = published(warehouse, snapshot).values()
    a, b = ({"bytes": (source / name).read_bytes(), "path": name} for name in ("a.jpg", "b.jpg"))
    assert row["images"] == [None, a, None, b]
    assert row["texts"] == ["one two", None, "three", None]
    assert [node["position"] for node in row["nodes"]] == [0, 1, 3, 4]
    assert [node["sample_id"] is None for node in row["nodes"]] == [True, False, True, False]
    assert (row["key"], row["metadata"], row["caption_words"]) == ("k", '{"key":"k","extra":5}', 3)
    (entry,) = read_manifest(warehouse, snapshot).documents
    names = warehouse.read_table(entry.path).column_names
    assert names[: len(INTERLEAVED)] == INTERLEAVED.names
    assert Dataset.from_parquet(warehouse.uri(entry.path))[0]["texts"] == row["texts"]


def test_published_shards_can_be_ingested_again(warehouse: Warehouse, source: Path, tmp_path: Path) -> None:
    write(source, document("k", "one", "a.jpg", "two"), document("l", "b.jpg", "three"))
    before = published(warehouse, publish(warehouse, run(warehouse, source)))
    other = Warehouse(str(tmp_path / "other"))
    for entry in read_manifest(warehouse, publish(warehouse, run(warehouse, source))).documents:
        (tmp_path / "again").mkdir(exist_ok=True)
        pq.write_table(warehouse.read_table(entry.path), tmp_path / "again" / "x.parquet")
    again = published(other, publish(other, run(other, tmp_path / "again")))
    for key, row in before.items():
        assert (again[key]["texts"], again[key]["images"]) == (row["texts"], row["images"])


def test_documents_are_judged_by_what_is_left_of_them(warehouse: Warehouse, source: Path) -> None:
    write(
        source,
        document("good", "one two three", "b.jpg"),
        document("short", "one two three", "one", "b.jpg"),
        document("small", "one two three four", "a.jpg"),
        document("both", "one", "a.jpg", "gone.jpg"),
    )
    judged = run(
        warehouse,
        source,
        images={"conditions": {"side": "width > 30"}},
        texts={"words": "caption_words >= 3", "no_digits": "not regexp_matches(text, '[0-9]')"},
        documents={"images": "kept_images >= 1", "words": "caption_words >= 3", "whole": "missing_share < 0.5"},
    )
    tables = Tables.read(warehouse, judged)
    failed = {key: row["failed"] for key, row in tables.decisions.items()}
    assert failed == {"good": [], "short": [], "small": ["images"], "both": ["images", "words", "whole"]}
    assert [node["failed"] for node in tables.nodes["short"]] == [[], ["words"], []]
    counts = tables.decisions["both"]
    assert {name: counts[name] for name in ("texts", "images", "missing_images", "kept_texts", "kept_images")} == {
        **{"texts": 1, "images": 2, "missing_images": 1, "kept_texts": 0, "kept_images": 0},
    }
    assert counts["missing_share"] == 0.5
    assert tables.decisions["short"]["caption_words"] == 3
    assert set(published(warehouse, publish(warehouse, judged))) == {"good", "short"}


def test_documents_of_images_alone_are_judged_too(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "a.jpg"), document("l", "gone.jpg"))
    judged = run(
        warehouse, source, texts={"words": "caption_words >= 3"}, documents={"texts": "kept_texts > 0", "words": "true"}
    )
    failed = {key: row["failed"] for key, row in Tables.read(warehouse, judged).decisions.items()}
    assert failed == {"k": ["texts"], "l": ["texts"]}
    assert read_manifest(warehouse, publish(warehouse, judged)).documents == ()


def test_a_value_that_a_condition_can_not_handle_is_named(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one " * 200, "a.jpg"))
    with pytest.raises(PolicyError, match=r"policy p: a condition met a value it can't handle.*try_cast"):
        run(warehouse, source, texts={"words": "caption_words::TINYINT > 0"})


def test_duplicate_images_stay_in_one_document_only(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one", "a.jpg"), document("l", "two", "a.jpg", "b.jpg"))
    judged, _ = run_by_bytes(warehouse, source)
    nodes = [node for rows in Tables.read(warehouse, judged).nodes.values() for node in rows if node["kind"] == "image"]
    assert sum(node["kept"] for node in nodes) == 2
    (copy,) = (node for node in nodes if not node["kept"])
    assert (copy["failed"], copy["duplicate_rule"]) == ([], "same")
    assert copy["duplicate_of"] in {node["sample_id"] for node in nodes if node["kept"]}


def test_of_equal_documents_the_preferred_one_stays_and_stands_for_the_others(
    warehouse: Warehouse, source: Path
) -> None:
    write(source, document("k", "torn, but the longest", "b.jpg", "gone.jpg"))
    run(warehouse, source)
    write(source, document("k", "short", "a.jpg"), document("k", "longer", "a.jpg"), document("l", "longer", "b.jpg"))
    prefer = ["missing_images asc", "caption_chars desc", "key desc"]
    judged = run(warehouse, source, one_per=["key", "text_digest"], prefer=prefer)
    stored = [row for shard in judged.documents.shards for row in warehouse.read_table(shard.path).to_pylist()]
    names = {row["document_id"]: f"{row['key']}: {row['segments'][0]['text']}" for row in stored}
    rows = [
        row for s in judged.documents.shards for row in warehouse.read_table(judged.decisions.documents(s)).to_pylist()
    ]
    assert {names[row["document_id"]]: (names.get(row["duplicate_of"]), row["duplicate_rule"]) for row in rows} == {
        "k: torn, but the longest": ("l: longer", "key"),  # by way of k: longer
        "k: short": ("l: longer", "key"),
        "k: longer": ("l: longer", "text_digest"),
        "l: longer": (None, None),
    }
    assert [names[row["document_id"]] for row in rows if row["kept"]] == ["l: longer"]
    counts = read_manifest(warehouse, publish(warehouse, judged)).counts
    assert (counts["duplicates.key"], counts["duplicates.text_digest"], counts["kept"]) == (2, 1, 1)


def test_versions_and_copies_of_a_document_share_its_split(warehouse: Warehouse, source: Path) -> None:
    rows = []
    for at in range(25):
        rows += [document(f"k{at}", f"a {at}", "a.jpg"), document(f"k{at}", f"b {at}", "a.jpg")]
        rows += [document(f"l{at}", f"b {at}", "b.jpg")]
    write(source, *rows)
    snapshot = publish(warehouse, run(warehouse, source))
    entries = read_manifest(warehouse, snapshot).documents
    stored = [row for entry in entries for row in warehouse.read_table(entry.path).to_pylist()]
    by_group: dict[str, set[str]] = {}
    for row in stored:
        by_group.setdefault(row["key"][1:], set()).add(row["split"])
    assert len(stored) == 75
    assert all(len(splits) == 1 for splits in by_group.values())
    assert {split for splits in by_group.values() for split in splits} == {"train", "validation", "test"}


def test_a_snapshot_is_cached_numbered_and_shares_what_did_not_change(warehouse: Warehouse, source: Path) -> None:
    write(source, *(document(f"k{at}", f"text {at}", "a.jpg") for at in range(8)))
    first = publish(warehouse, run(warehouse, source))
    assert publish_documents("set", run(warehouse, source), [], warehouse=warehouse).cached
    second = publish(warehouse, run(warehouse, source, documents={"not_three": "key <> 'k3'"}))
    (before,), (after,) = (read_manifest(warehouse, ref).documents for ref in (first, second))
    assert (second.number, before.rows, after.rows) == (2, 8, 7)
    third = publish(warehouse, run(warehouse, source))
    assert read_manifest(warehouse, third).documents == (before,)
    splits = [{key: row["split"] for key, row in published(warehouse, ref).items()} for ref in (first, third)]
    assert splits[0] == splits[1]


def test_another_threshold_measures_nothing_again(
    warehouse: Warehouse, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(source, document("k", "one two", "a.jpg"), document("l", "one", "three four five", "b.jpg"))
    first = run(warehouse, source, texts={"words": "caption_words > 1"}, documents={"words": "caption_words > 1"})
    monkeypatch.setattr("tasks.curation.signals.caption.CaptionStatistics.measure", lambda *_: pytest.fail("measured"))
    again = run(warehouse, source, texts={"words": "caption_words > 1"}, documents={"words": "caption_words > 2"})
    assert again.decisions != first.decisions
    assert {key: row["kept"] for key, row in Tables.read(warehouse, again).decisions.items()} == {"k": False, "l": True}


def test_the_catalog_and_expiry_know_documents(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one", "a.jpg"), document("l", "two", "gone.jpg"))
    publish(warehouse, run(warehouse, source))
    judged = run(warehouse, source, documents={"images": "kept_images > 0"})
    latest = publish(warehouse, judged)
    with connect(warehouse) as catalog:
        assert catalog.execute("SELECT count(*) FROM documents").fetchall() == [(2,)]
        assert catalog.execute("SELECT key, failed FROM document_decisions WHERE NOT kept").fetchall() == [
            ("l", ["images"])
        ]
        query = "SELECT count(*) FROM node_decisions WHERE list_contains(failed, 'missing')"
        assert catalog.execute(query).fetchall() == [(1,)]
        assert catalog.execute("SELECT key, len(images) FROM interleaved").fetchall() == [("k", 2)]
        assert catalog.execute("SELECT samples, kept FROM snapshots ORDER BY snapshot").fetchall() == [(2, 2), (2, 1)]
        assert catalog.execute("SELECT count(*) FROM curated").fetchall() == [(0,)]
    files = read_manifest(warehouse, latest).files
    document_difference(latest, warehouse=warehouse)
    expired = expire(warehouse, "set", keep=1)
    assert expired.snapshots == (1,)
    assert expired.files
    assert all(warehouse.exists(entry.path) for entry in files)
    assert set(published(warehouse, latest)) == {"k"}


def test_decisions_of_other_inputs_are_refused(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one", "a.jpg"))
    judged = run(warehouse, source)
    other = Judged(
        judged.documents,
        policy(order="dom", one_per=["key"]),
        *(judged.images, judged.signals, judged.texts),
        judged.decisions,
    )
    with pytest.raises(EvidenceError, match="does not hold the decisions of policy p on these documents"):
        publish_documents("set", other, [], warehouse=warehouse)
