"""The pictures of a report: which samples to show, and their images as small JPEGs inside the page.

Samples are chosen by their ids, which are hashes: a fair choice, and the same one every time.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from storage.refs import ShardRef
from storage.warehouse import Warehouse
from tasks.curation.report.measured import Measured

SHARDS = 16
"""Shards that pictures are taken from, so that a report on a large pool reads some of its images only."""
KEPT = 24
REJECTED = 8
GROUPS = 10
GROUP_SIZE = 5
SIDE = 128
QUALITY = 72
MAX_CAPTION = 160


@dataclass(frozen=True)
class Picture:
    """One sample as the report shows it.

    `image` is a data URL, or None where there is nothing to show; `measures` has the conditions that judge by a number
    and the number.
    """

    sample_id: str
    key: str
    caption: str
    image: str | None
    measures: tuple[tuple[tuple[str, ...], str], ...]
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """A survivor, some of the samples it stands for with what joins them, and how many there are in all."""

    survivor: Picture
    duplicates: tuple[tuple[Picture, str], ...]
    size: int


@dataclass(frozen=True)
class Pictures:
    """Samples to show: some that were kept, some that each condition rejects, and the largest groups of duplicates."""

    kept: tuple[Picture, ...]
    rejected: Mapping[str, tuple[Picture, ...]]
    groups: tuple[Group, ...]


def take_pictures(measured: Measured, conditions: Collection[str], *, warehouse: Warehouse) -> Pictures:
    """Choose samples from the first `SHARDS` shards by name, a hash, and read their images."""
    samples = measured.samples.append_column("place", pa.array(np.arange(len(measured.samples))))
    with duckdb.connect() as connection:
        connection.register("every", samples)
        connection.execute(f"CREATE VIEW near AS SELECT * FROM every WHERE shard < {SHARDS}")
        kept = _column(connection, f"SELECT place FROM near WHERE kept ORDER BY sample_id LIMIT {KEPT}")
        rejected = {
            name: _column(
                connection,
                "SELECT place FROM near WHERE list_contains(failed, $name) "
                f"ORDER BY len(failed), sample_id LIMIT {REJECTED}",
                name=name,
            )
            for name in conditions
        }
        groups = connection.execute(
            f"""
            SELECT s.place, g.size, g.members
            FROM (SELECT duplicate_of, count(*) AS size,
                         list({{'place': place, 'rule': duplicate_rule, 'distance': duplicate_distance}}
                              ORDER BY duplicate_distance, sample_id)[:{GROUP_SIZE}] AS members
                  FROM near WHERE duplicate_of IS NOT NULL AND len(failed) = 0 GROUP BY ALL) g
            JOIN near s ON s.sample_id = g.duplicate_of
            ORDER BY g.size DESC, s.sample_id LIMIT {GROUPS}
            """
        ).fetchall()
    shown = {*kept, *(at for row in rejected.values() for at in row)}
    shown |= {at for survivor, _, members in groups for at in (survivor, *(m["place"] for m in members))}
    pictures = _read(measured, shown, warehouse)
    return Pictures(
        tuple(pictures[at] for at in kept),
        {name: tuple(pictures[at] for at in row) for name, row in rejected.items()},
        tuple(
            Group(
                pictures[survivor],
                tuple((pictures[m["place"]], f"{m['rule']}, distance {m['distance']:.3g}") for m in members),
                size,
            )
            for survivor, size, members in groups
        ),
    )


def thumbnail(data: bytes | None) -> str | None:
    """Return an image as the data URL of a JPEG of at most `SIDE` pixels a side, or None if it can't be decoded."""
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception:  # a decoder's errors have no common type, and a report must not fail for one image
        return None
    upright.thumbnail((SIDE, SIDE))
    ground = Image.new("RGBA", upright.size, "white")
    target = io.BytesIO()
    Image.alpha_composite(ground, upright).convert("RGB").save(target, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode()


def _column(connection: duckdb.DuckDBPyConnection, query: str, **parameters: str) -> list[int]:
    return [row[0] for row in connection.execute(query, parameters or None).fetchall()]


def _read(measured: Measured, wanted: Collection[int], warehouse: Warehouse) -> dict[int, Picture]:
    """The pictures of some samples by their place; one row group of images in memory at a time."""
    places = pa.array(sorted(wanted))
    rows = measured.samples.select(["shard", "row", "failed"]).take(places).to_pylist()
    by_shard: dict[int, dict[int, int]] = defaultdict(dict)
    failed = {}
    for at, row in zip(places.to_pylist(), rows, strict=True):
        by_shard[row["shard"]][row["row"]] = at
        failed[at] = tuple(row["failed"])
    pictures = {}
    for shard, places_by_row in by_shard.items():
        for at, sample in _samples(measured.shards[shard], places_by_row, warehouse):
            pictures[at] = Picture(
                sample["sample_id"],
                sample["key"],
                _shortened(sample["caption"] or ""),
                thumbnail(sample["image"]["bytes"]),
                tuple((m.conditions, f"{m.values[at]:.3g}") for m in measured.measures if np.isfinite(m.values[at])),
                failed[at],
            )
    return pictures


def _samples(shard: ShardRef, wanted: Mapping[int, int], warehouse: Warehouse) -> list[tuple[int, dict[str, Any]]]:
    """(place, row) of a shard's wanted rows, `wanted` being the place by the row's number."""
    found, begin = [], 0
    with warehouse.open_parquet(shard.path) as file:
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            own = [row for row in wanted if begin <= row < end]
            if own:
                rows = file.read_row_group(group, ["sample_id", "key", "caption", "image"])
                taken = rows.take(pa.array([row - begin for row in own])).to_pylist()
                found += list(zip((wanted[row] for row in own), taken, strict=True))
            begin = end
    return found


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_CAPTION else text[: MAX_CAPTION - 1] + "…"
