"""The documents and texts that a report shows: which ones, and their segments in small."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.refs import DocumentShardRef, ShardRef
from storage.warehouse import Warehouse
from tasks.curation.interleaved.policy import MISSING
from tasks.curation.interleaved.texts import read_segments
from tasks.curation.report.document_measures import MeasuredDocuments
from tasks.curation.report.pictures import SHARDS, read_samples, shortened, thumbnail, values_of

KEPT = 9
REJECTED = 30
"""Documents and texts of each kind shown as rejected by all conditions together, at least one each."""
MOST_REJECTED = 3
SEGMENTS = 8
LEFT_OUT = 4
"""Segments shown of a document, of those that stay and of the others."""
SIDE = 96
MAX_TEXT = 240


@dataclass(frozen=True)
class Segment:
    """A text or image; `reasons` say why it was left out.

    `text` is that which an image is assigned to, if it is; `image` a data URL, None if there is nothing to show.
    """

    text: str
    image: str | None
    is_image: bool
    similarity: float | None
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A document as the report shows it: what stays of it, in the order published, and what was left out."""

    document_id: str
    key: str
    failed: tuple[str, ...]
    duplicate: str
    measures: tuple[tuple[tuple[str, ...], str], ...]
    staying: tuple[Segment, ...]
    more_staying: int
    left_out: tuple[Segment, ...]
    more_left_out: int


@dataclass(frozen=True)
class Text:
    """A rejected text, with the conditions that judge by a number and the number."""

    text: str
    measures: tuple[tuple[tuple[str, ...], str], ...]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """Documents that were kept, and documents and texts that each condition or column of `one_per` rejects."""

    kept: tuple[Document, ...]
    rejected: Mapping[str, tuple[Document, ...]]
    texts: Mapping[str, tuple[Text, ...]]


def per_condition(conditions: Collection[str]) -> int:
    """Return how many to show of what each condition rejects, so that the page stays small."""
    return max(1, min(MOST_REJECTED, REJECTED // max(1, len(conditions))))


def take_documents(
    measured: MeasuredDocuments,
    conditions: Sequence[str],
    one_per: Sequence[str],
    texts: Sequence[str],
    *,
    warehouse: Warehouse,
) -> Sheet:
    """Choose documents and texts from the first `SHARDS` shards by a hash, and read them."""
    of_documents, of_texts = per_condition([*conditions, *one_per]), per_condition(texts)
    with duckdb.connect() as connection:
        places = pa.array(np.arange(len(measured.documents)))
        connection.register("documents", measured.documents.append_column("place", places))
        connection.register("texts", measured.texts.append_column("place", pa.array(np.arange(len(measured.texts)))))

        def chosen(table: str, which: str, order: str, most: int, *values: str) -> list[int]:
            query = f"SELECT place FROM {table} WHERE shard < {SHARDS} AND {which} ORDER BY {order} LIMIT {most}"
            return [row[0] for row in connection.execute(query, values).fetchall()]

        fails, reasons = "list_contains(failed, ?)", "len(failed), document_id"
        kept = chosen("documents", "kept", "document_id", KEPT)
        rejected = {name: chosen("documents", fails, reasons, of_documents, name) for name in conditions}
        equal = "len(failed) = 0 AND duplicate_rule = ?"
        rejected |= {
            f"one per {name}": chosen("documents", equal, "document_id", of_documents, name) for name in one_per
        }
        bad_texts = {name: chosen("texts", fails, f"{reasons}, position", of_texts, name) for name in texts}
    shown = _documents(measured, {*kept, *(at for row in rejected.values() for at in row)}, warehouse)
    said = _texts(measured, {at for row in bad_texts.values() for at in row}, warehouse)
    return Sheet(
        tuple(shown[at] for at in kept),
        {name: tuple(shown[at] for at in row) for name, row in rejected.items()},
        {name: tuple(said[at] for at in row) for name, row in bad_texts.items()},
    )


def _by_shard(rows: pa.Table, places: Collection[int]) -> dict[int, list[tuple[int, dict[str, Any]]]]:
    """(place, row) of some rows, by shard."""
    ordered = sorted(places)
    found: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for at, row in zip(ordered, rows.take(pa.array(ordered, pa.int64())).to_pylist(), strict=True):
        found[row["shard"]].append((at, row))
    return found


# -- texts ----------------------------------------------------------------------------------------------------


def _texts(measured: MeasuredDocuments, wanted: Collection[int], warehouse: Warehouse) -> dict[int, Text]:
    found = {}
    for at, rows in _by_shard(measured.texts, wanted).items():
        segments = read_segments(measured.shards[at], warehouse=warehouse)
        said = {(row["document_id"], row["position"]): row["text"] for row in segments.to_pylist()}
        for place, row in rows:
            text = shortened(said[row["document_id"], row["position"]], MAX_TEXT)
            found[place] = Text(text, values_of(measured.of_texts, place), tuple(row["failed"]))
    return found


# -- documents ------------------------------------------------------------------------------------------------


def _documents(measured: MeasuredDocuments, wanted: Collection[int], warehouse: Warehouse) -> dict[int, Document]:
    found = {}
    for at, rows in _by_shard(measured.documents, wanted).items():
        ids = pa.array([row["document_id"] for _, row in rows], pa.string())
        shard = measured.shards[at]
        segments = {
            row["document_id"]: row["segments"]
            for row in _only(warehouse.read_table(shard.path, ["document_id", "segments"]), ids)
        }
        nodes: dict[str, list[dict[str, Any]]] = {name: [] for name in segments}
        for node in _only(warehouse.read_table(measured.nodes[at]), ids):
            own = segments[node["document_id"]]
            at_text = node["position"] if node["text_position"] is None else node["text_position"]
            said = {"reason": own[node["position"]]["reason"], "text": own[at_text]["text"]}
            nodes[node["document_id"]].append(node | said)
        parts = {name: _parted(own) for name, own in nodes.items()}
        shown = [node for staying, left in parts.values() for node in (*staying[:SEGMENTS], *left[:LEFT_OUT])]
        images = _images(shard, [node["sample_id"] for node in shown if node["sample_id"]], warehouse)
        for place, row in rows:
            found[place] = _document(row, *parts[row["document_id"]], images, values_of(measured.of_documents, place))
    return found


def _only(table: pa.Table, ids: pa.Array) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.filter(pc.is_in(table["document_id"], value_set=ids)).to_pylist()
    return rows


def _parted(nodes: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The segments that stay, in the order published, and the others in the source's."""
    staying = sorted((node for node in nodes if node["place"] is not None), key=lambda node: int(node["place"]))
    return staying, [node for node in nodes if node["place"] is None]


def _images(shard: DocumentShardRef, wanted: Collection[str], warehouse: Warehouse) -> dict[str, str | None]:
    """Some images of a shard as data URLs by sample."""
    samples = ShardRef(shard.pool, shard.name, 0)
    if not wanted:
        return {}
    ids = warehouse.read_table(samples.path, ["sample_id"])["sample_id"]
    rows = {pc.index(ids, name).as_py(): name for name in wanted}
    found = read_samples(samples, rows, warehouse=warehouse)
    return {name: thumbnail(sample["image"]["bytes"], SIDE) for name, sample in found}


def _document(
    row: Mapping[str, Any],
    staying: list[dict[str, Any]],
    left_out: list[dict[str, Any]],
    images: Mapping[str, str | None],
    measures: tuple[tuple[tuple[str, ...], str], ...],
) -> Document:
    return Document(
        row["document_id"],
        row["key"],
        tuple(row["failed"]),
        f"{row['duplicate_of'][:12]}, equal in {row['duplicate_rule']}, stands in its place"
        if row["duplicate_of"]
        else "",
        measures,
        tuple(_segment(node, images) for node in staying[:SEGMENTS]),
        max(0, len(staying) - SEGMENTS),
        tuple(_segment(node, images) for node in left_out[:LEFT_OUT]),
        max(0, len(left_out) - LEFT_OUT),
    )


def _segment(node: Mapping[str, Any], images: Mapping[str, str | None]) -> Segment:
    reasons = [f"{MISSING}: {node['reason']}" if name == MISSING else name for name in node["failed"]]
    reasons += [f"duplicate: {node['duplicate_rule']}"] if node["duplicate_rule"] else []
    return Segment(
        shortened(node["text"] or "", MAX_TEXT),
        images.get(node["sample_id"]),
        node["kind"] == "image",
        node["similarity"],
        tuple(reasons),
    )
