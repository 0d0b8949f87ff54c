"""The pictures of a report: which samples to show, and their images as small JPEGs inside the page.

Samples are chosen by their ids, which are hashes: a fair choice, and the same one every time.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import duckdb
import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps

from storage.refs import ShardRef
from storage.warehouse import Warehouse
from tasks.curation.report.measured import Measure, Measured

T = TypeVar("T")

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


def take_pictures(
    measured: Measured,
    conditions: Collection[str],
    *,
    warehouse: Warehouse,
    most_kept: int = KEPT,
    most_rejected: int = REJECTED,
) -> Pictures:
    """Choose samples from the first `SHARDS` shards by name, a hash, and read their images.

    At most so many that are kept, and so many that each of the conditions rejects.
    """
    samples = measured.samples.append_column("place", pa.array(np.arange(len(measured.samples))))
    with duckdb.connect() as connection:
        connection.register("every", samples)
        connection.execute(f"CREATE VIEW near AS SELECT * FROM every WHERE shard < {SHARDS}")
        kept = _column(connection, f"SELECT place FROM near WHERE kept ORDER BY sample_id LIMIT {most_kept}")
        rejected = {
            name: _column(
                connection,
                "SELECT place FROM near WHERE list_contains(failed, $name) "
                f"ORDER BY len(failed), sample_id LIMIT {most_rejected}",
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
                tuple((pictures[m["place"]], _joined_by(m)) for m in members),
                size,
            )
            for survivor, size, members in groups
        ),
    )


def thumbnail(data: bytes | None, side: int = SIDE) -> str | None:
    """Return an image as the data URL of a JPEG of at most `side` pixels a side, or None if it can't be decoded."""
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            image.draft("RGB", (2 * side, 2 * side))
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception:  # a decoder's errors have no common type, and a report must not fail for one image
        return None
    upright.thumbnail((side, side))
    ground = Image.new("RGBA", upright.size, "white")
    target = io.BytesIO()
    Image.alpha_composite(ground, upright).convert("RGB").save(target, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(target.getvalue()).decode()


def _column(connection: duckdb.DuckDBPyConnection, query: str, **parameters: str) -> list[int]:
    return [row[0] for row in connection.execute(query, parameters or None).fetchall()]


def _read(measured: Measured, wanted: Collection[int], warehouse: Warehouse) -> dict[int, Picture]:
    """The pictures of some samples by their place; one row group of images in memory at a time."""
    places = pa.array(sorted(wanted), pa.int64())
    rows = measured.samples.select(["shard", "row", "failed"]).take(places).to_pylist()
    by_shard: dict[int, dict[int, int]] = defaultdict(dict)
    failed = {}
    for at, row in zip(places.to_pylist(), rows, strict=True):
        by_shard[row["shard"]][row["row"]] = at
        failed[at] = tuple(row["failed"])
    pictures = {}
    for shard, places_by_row in by_shard.items():
        for at, sample in read_samples(measured.shards[shard], places_by_row, warehouse=warehouse):
            pictures[at] = Picture(
                sample["sample_id"],
                sample["key"],
                shortened(sample["caption"] or ""),
                thumbnail(sample["image"]["bytes"]),
                values_of(measured.measures, at),
                failed[at],
            )
    return pictures


def read_samples(shard: ShardRef, wanted: Mapping[int, T], *, warehouse: Warehouse) -> list[tuple[T, dict[str, Any]]]:
    """Return (value, sample) for some rows of a shard; `wanted` has a value by the row's number.

    One row group of images is in memory at a time.
    """
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


def values_of(measures: Iterable[Measure], row: int) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Return, of each measure that the row has and that conditions judge by, these and the number as text."""
    judging = (measure for measure in measures if measure.conditions)
    return tuple((m.conditions, f"{m.values[row]:.3g}") for m in judging if np.isfinite(m.values[row]))


def shortened(text: str, length: int = MAX_CAPTION) -> str:
    """Return text on one line, cut where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _joined_by(member: Mapping[str, Any]) -> str:
    distance = member["distance"]
    return str(member["rule"]) if distance is None else f"{member['rule']}, distance {distance:.3g}"
