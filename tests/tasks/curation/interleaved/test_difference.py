"""What changed between two snapshots of documents written by hand, and the reasons given."""

from pathlib import Path
from typing import Any

from storage.catalog import connect
from storage.expire import expire
from storage.pool import read_documents
from storage.refs import DocumentsRef, PoolRef, SnapshotRef
from storage.schema import DOCUMENT_DIFFERENCE
from storage.warehouse import Warehouse
from tasks.curation.interleaved.difference import document_difference, document_difference_markdown
from tests.tasks.curation.interleaved.chain import judge, publish
from tests.tasks.curation.interleaved.handmade import MEASURE, document, policy, run, write

Row = dict[str, Any]


def curate(warehouse: Warehouse, source: Path, **content: Any) -> SnapshotRef:
    return publish(warehouse, run(warehouse, source, **content))


def rows(warehouse: Warehouse, snapshot: SnapshotRef) -> list[Row]:
    table = warehouse.read_table(document_difference(snapshot, warehouse=warehouse).ref)
    assert table.schema.equals(DOCUMENT_DIFFERENCE)
    found: list[Row] = table.to_pylist()
    return found


def changes(warehouse: Warehouse, snapshot: SnapshotRef) -> dict[str, tuple[str, str, str]]:
    """(change, cause, because) by key."""
    return {row["key"]: (row["change"], row["cause"], row["because"]) for row in rows(warehouse, snapshot)}


def segments(warehouse: Warehouse, snapshot: SnapshotRef) -> dict[str, list[tuple[int, str, str, str]]]:
    """(position, kind, change, because) of each changed segment, by key."""
    names = ("position", "kind", "change", "because")
    return {
        row["key"]: [tuple(segment[name] for name in names) for segment in row["segments"]]  # type: ignore[misc]
        for row in rows(warehouse, snapshot)
    }


def test_a_first_snapshot_adds_all_documents_that_it_keeps(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one", "a.jpg"), document("l", "two", "gone.jpg"))
    first = curate(warehouse, source, documents={"images": "kept_images > 0"})
    assert changes(warehouse, first) == {"k": ("added", "new_document", "new document")}
    assert segments(warehouse, first) == {"k": []}


def test_a_changed_threshold_of_documents_is_named_with_both_values(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one two three", "a.jpg"), document("l", "one", "a.jpg"))
    rule = {"words": "caption_words >= $least"}
    curate(warehouse, source, documents=rule, parameters={"least": 1})
    second = curate(warehouse, source, documents=rule, parameters={"least": 2})
    why = "words: caption_words >= $least, $least = 1 became caption_words >= $least, $least = 2"
    assert changes(warehouse, second) == {"l": ("removed", "condition", why)}
    third = curate(warehouse, source)
    why = "words: no longer asked (caption_words >= $least, $least = 2)"
    assert changes(warehouse, third) == {"l": ("added", "condition", why)}


def test_a_document_that_stays_with_fewer_images_and_texts_says_which_and_why(
    warehouse: Warehouse, source: Path
) -> None:
    write(source, document("k", "one", "a.jpg", "two three", "b.jpg"), document("l", "two three", "b.jpg"))
    curate(warehouse, source)
    rules = {"images": {"conditions": {"side": "width > 30"}}, "texts": {"words": "caption_words > 1"}}
    second = curate(warehouse, source, **rules)
    text, image = "words: newly asked (caption_words > 1)", "side: newly asked (width > 30)"
    why = f"image removed, {image}; text removed, {text}"
    assert changes(warehouse, second) == {"k": ("changed", "segments", why)}
    assert segments(warehouse, second) == {"k": [(0, "text", "removed", text), (1, "image", "removed", image)]}
    third = curate(warehouse, source, texts=rules["texts"])
    back = "side: no longer asked (width > 30)"
    assert segments(warehouse, third) == {"k": [(1, "image", "added", back)]}


def test_a_document_rejected_for_what_became_of_its_images_names_their_condition(
    warehouse: Warehouse, source: Path
) -> None:
    write(source, document("k", "one", "a.jpg"), document("l", "two", "b.jpg"))
    documents = {"images": "kept_images > 0"}
    curate(warehouse, source, documents=documents)
    second = curate(warehouse, source, documents=documents, images={"conditions": {"side": "width > 30"}})
    side = "side: newly asked (width > 30)"
    why = f"images: its segments changed (image removed, {side})"
    assert changes(warehouse, second) == {"k": ("removed", "condition", why)}
    assert segments(warehouse, second) == {"k": [(1, "image", "removed", side)]}


def test_documents_that_come_into_the_pool_or_leave_it_are_said_to(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one", "a.jpg"))
    curate(warehouse, source)
    write(source, document("l", "two", "b.jpg"))
    assert changes(warehouse, curate(warehouse, source)) == {"l": ("added", "new_document", "new document")}
    every = read_documents(warehouse, "p")
    (of_l,) = (s for s in every.shards if warehouse.read_table(s.path, ["key"])["key"].to_pylist() == ["l"])
    images = PoolRef("p", tuple(shard for shard in every.images.shards if shard.name == of_l.name))
    third = publish(warehouse, judge(warehouse, DocumentsRef((of_l,), images), policy(), measure=MEASURE))
    assert changes(warehouse, third) == {"k": ("removed", "left_pool", "left pool")}


def test_a_newer_version_takes_the_place_of_a_document(warehouse: Warehouse, source: Path) -> None:
    rules = {"one_per": ["key"], "prefer": ["caption_chars desc"]}
    write(source, document("k", "short", "a.jpg"))
    curate(warehouse, source, **rules)
    write(source, document("k", "much longer", "a.jpg"))
    found = rows(warehouse, curate(warehouse, source, **rules))
    assert {(row["change"], row["cause"], row["because"]) for row in found} == {
        ("added", "new_document", "new document"),
        ("removed", "duplicate", "key: its survivor is new"),
    }
    back = rows(warehouse, curate(warehouse, source))
    assert [(row["change"], row["because"]) for row in back] == [("added", "key: no longer asked")]


def test_the_same_documents_for_other_reasons_are_no_difference(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one", "a.jpg"))
    curate(warehouse, source)
    second = curate(warehouse, source, documents={"images": "kept_images > 0"})
    assert changes(warehouse, second) == {}
    assert "Nothing was added, removed or changed" in document_difference_markdown(second, warehouse=warehouse)


def test_the_difference_lies_in_the_catalog_and_goes_with_its_snapshot(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one", "a.jpg"), document("l", "two", "a.jpg", "b.jpg"))
    first = curate(warehouse, source)
    assert not document_difference(first, warehouse=warehouse).cached
    assert document_difference(first, warehouse=warehouse).cached
    second = curate(warehouse, source, images={"conditions": {"side": "width > 30"}})
    document_difference(second, warehouse=warehouse)
    with connect(warehouse) as catalog:
        query = "SELECT snapshot, key, change, len(segments) FROM document_differences ORDER BY ALL"
        assert catalog.execute(query).fetchall() == [
            *((1, "k", "added", 0), (1, "l", "added", 0)),
            *((2, "k", "changed", 1), (2, "l", "changed", 1)),
        ]
        assert catalog.execute("SELECT count(*) FROM differences").fetchall() == [(0,)]
    markdown = document_difference_markdown(second, warehouse=warehouse)
    assert "| image removed | side: newly asked (width > 30) | 2 |" in markdown
    expire(warehouse, "set", keep=1)
    assert not warehouse.exists(first.difference)
    assert warehouse.exists(second.difference)
