"""The files of a snapshot, each named by what it holds and left alone if it is there already."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from storage.fingerprint import file_digest, fingerprint
from storage.refs import ShardRef, SignalRef
from storage.schema import CURATED, FACES_BLURRED, SAMPLES, SPLIT
from storage.snapshot import FileEntry
from storage.warehouse import ROW_GROUP_BYTES, Warehouse, parquet_options
from tasks.curation import face_blur
from tasks.curation.columns import Columns

VERSION = 1


@dataclass(frozen=True)
class Verdicts:
    """What is published about one shard's samples, in its order: the decisions, and the split or null for no."""

    shard: ShardRef
    decisions: pa.Table
    split: pa.StringArray

    @property
    def published(self) -> int:
        """How many samples are published."""
        return len(self.split) - int(self.split.null_count)


@dataclass(frozen=True)
class SnapshotFiles:
    """Writes a dataset's files.

    `known` has the parent snapshot's entries by path, which need no second look; `faces` is the signal that says where
    there are faces to blur, None to leave images as they are.
    """

    dataset: str
    columns: Columns
    known: Mapping[str, FileEntry]
    warehouse: Warehouse
    faces: SignalRef | None = None

    def write_decisions(self, verdicts: Verdicts) -> FileEntry:
        """Write the decisions on one shard."""
        table = verdicts.decisions
        names = ("duplicate_of", "duplicate_rule", "contaminated_by")
        said = [pc.binary_join(table["failed"], ","), *(table[name] for name in names)]
        content = digest_rows(*said, table["duplicate_distance"].cast(pa.string()))  # what is kept follows from these
        identity = fingerprint([VERSION, verdicts.shard.name, content])
        return self.write(f"decisions/{identity}", lambda: verdicts.decisions, verdicts.shard.name)

    def write_curated(self, verdicts: Verdicts) -> FileEntry:
        """Write the published samples of one shard, with their split and the signals' scalar columns."""
        shard = verdicts.shard
        published = verdicts.decisions["sample_id"].filter(verdicts.split.is_valid())
        signals = [[signal.signal, signal.fingerprint] for signal in self.columns.by_signal]
        blurred = [face_blur.VERSION, self.faces.fingerprint] if self.faces else []
        identity = fingerprint(
            [VERSION, shard.name, signals, *blurred, digest_rows(published, verdicts.split.drop_null())]
        )
        path = f"snapshots/{self.dataset}/curated/{identity}.parquet"
        if not self._is_there(path):
            with self.warehouse.building(path) as temporary:
                self._fill_curated(temporary, verdicts)
        return self._entry(path, shard.name)

    def write_published(self, earlier: pa.Table, now: pa.Table) -> FileEntry | None:
        """Write every sample ever published: those of earlier snapshots and those that have a split `now`."""
        now = now.filter(now["split"].is_valid())
        is_new = pc.invert(pc.is_in(now["sample_id"], value_set=earlier["sample_id"].combine_chunks()))
        table = pa.concat_tables([earlier, now.filter(is_new)]).sort_by("sample_id")
        if not table.num_rows:
            return None
        identity = fingerprint([VERSION, digest_rows(*table.columns)])
        return self.write(f"published/{identity}", lambda: table, "")

    def write(self, name: str, make: Callable[[], pa.Table], pool_shard: str) -> FileEntry:
        """Write a table unless a file of its name, which is that of its content, is there already."""
        path = f"snapshots/{self.dataset}/{name}.parquet"
        if not self._is_there(path):
            self.warehouse.write_table(path, make())
        return self._entry(path, pool_shard)

    def _fill_curated(self, target: Path, verdicts: Verdicts) -> None:
        """Copy the published rows, one row group of the shard in memory at a time."""
        schema = pa.schema([*CURATED, *([FACES_BLURRED] if self.faces else []), *self.columns.schema])
        measured = self.columns.read(verdicts.shard, self.columns.schema.names, warehouse=self.warehouse)
        extra = measured.drop_columns("sample_id").add_column(0, SPLIT, verdicts.split)
        if self.faces:
            boxes = self.warehouse.read_table(self.faces.table(verdicts.shard), ["face_boxes"])
            extra = extra.append_column("face_boxes", boxes["face_boxes"])
        with pq.ParquetWriter(target, schema, **parquet_options(schema)) as writer:
            for rows in self._published_rows(verdicts.shard, extra):
                rows = _with_faces_blurred(rows) if self.faces else rows
                writer.write_table(rows.select(schema.names).cast(schema), row_group_size=len(rows))

    def _published_rows(self, shard: ShardRef, extra: pa.Table) -> Iterator[pa.Table]:
        """The shard's rows that have a split, with the columns of `extra`, in tables of about a row group."""
        waiting: list[pa.Table] = []
        begin = 0
        with self.warehouse.open_parquet(shard.path) as samples:
            for group in range(samples.num_row_groups):
                rows = samples.read_row_group(group, SAMPLES.names)
                beside = extra.slice(begin, len(rows))
                begin += len(rows)
                for name in beside.column_names:
                    rows = rows.append_column(name, beside[name])
                waiting.append(rows.filter(rows["split"].is_valid()))
                if sum(table.nbytes for table in waiting) >= ROW_GROUP_BYTES:
                    yield pa.concat_tables(waiting)
                    waiting = []
        if any(len(table) for table in waiting):
            yield pa.concat_tables(waiting)

    def _is_there(self, path: str) -> bool:
        return path in self.known or self.warehouse.exists(path)

    def _entry(self, path: str, pool_shard: str) -> FileEntry:
        if path in self.known:
            return self.known[path]
        with self.warehouse.downloaded(path) as file:
            rows = pq.read_metadata(file).num_rows
            return FileEntry(path, rows, file.stat().st_size, file_digest(file), pool_shard)


def _with_faces_blurred(rows: pa.Table) -> pa.Table:
    """The rows with the images that have `face_boxes` replaced, and the number of these in `faces_blurred`."""
    boxes = [found or [] for found in rows["face_boxes"].to_pylist()]
    images = [
        {**image, "bytes": face_blur.blur_faces(image["bytes"], found)} if found else image
        for image, found in zip(rows["image"].to_pylist(), boxes, strict=True)
    ]
    at = rows.schema.get_field_index("image")
    rows = rows.set_column(at, SAMPLES.field("image"), pa.array(images, SAMPLES.field("image").type))
    return rows.append_column(FACES_BLURRED, pa.array([len(found) for found in boxes], pa.int32()))


def digest_rows(*columns: pa.ChunkedArray | pa.Array) -> str:
    """Return the sha256 of text columns, row by row. Much faster than JSON for millions of rows."""
    rows = pc.binary_join_element_wise(*columns, "\t", null_handling="replace", null_replacement="")
    return hashlib.sha256("\n".join(rows.to_pylist()).encode()).hexdigest()
