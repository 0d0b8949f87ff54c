"""A warehouse: immutable objects under one root, on a local disk or any fsspec filesystem such as `s3://`.

Every object is built under a temporary name and appears whole or not at all, and none is ever overwritten, so
what can be read is complete and a killed process leaves nothing that looks done.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
TEMPORARY = ".temporary"
STALE_AFTER_SECONDS = 24 * 3600
ROW_GROUP_BYTES = 64 * 2**20
IMAGE_BYTES = "image.bytes"
"""The column of image files, as Parquet names it."""
SAMPLE_ID = "sample_id"


class WarehouseError(ValueError):
    """A warehouse was asked for something it can't do; the message says what to change."""


def check_name(name: str, what: str) -> str:
    """Return `name` if it can name a pool or dataset: lower-case letters, digits, `.`, `_`, `-`, at most 64.

    Raises `WarehouseError` otherwise, so a name can never lead outside its folder.
    """
    if not NAME.fullmatch(name) or ".." in name:
        raise WarehouseError(
            f"{what} name {name!r} can't be used. Use 1-64 lower-case letters, digits, '.', '_' or '-', "
            "beginning and ending with a letter or digit, without '..'."
        )
    return name


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Return how a table is written as Parquet: compressed with zstd, but for image files and sample ids.

    Image files are compressed already. Ids are read by every query, which plain takes half of the time, for 1.7 times
    the space. These and embeddings repeat nothing, so they get no dictionary: it would be read whole for one of them.
    """
    columns = {column: field.type for field in schema for column in _leaves(field.name, field.type)}
    plain = {IMAGE_BYTES, SAMPLE_ID}
    repeating = [name for name, kind in columns.items() if name not in plain and not pa.types.is_fixed_size_list(kind)]
    return {
        "compression": {name: "none" if name in plain else "zstd" for name in columns},
        "use_dictionary": repeating,
        "write_page_index": True,
    }


def _leaves(name: str, kind: pa.DataType) -> list[str]:
    """The columns that Parquet makes of a field."""
    if pa.types.is_struct(kind):
        return [leaf for child in kind.fields for leaf in _leaves(f"{name}.{child.name}", child.type)]
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        return _leaves(f"{name}.list.element", kind.value_type)
    return [name]


@dataclass(frozen=True)
class Warehouse:
    """Objects by relative path under `root`, a local folder or a URL that fsspec understands.

    Credentials and end points come from the filesystem's own settings (for S3: `AWS_*` variables or fsspec's
    configuration files), never from here.
    """

    root: str

    def __post_init__(self) -> None:
        if "://" not in self.root:
            object.__setattr__(self, "root", str(Path(self.root).expanduser().absolute()))
        elif self.root.startswith("file://"):
            object.__setattr__(self, "root", self.root.removeprefix("file://"))
        object.__setattr__(self, "root", self.root.rstrip("/"))

    @property
    def is_local(self) -> bool:
        """Whether the root is a folder of this machine."""
        return "://" not in self.root

    def uri(self, path: str) -> str:
        """Return where `path` is, for other tools: an absolute local path or a URL."""
        return f"{self.root}/{_checked(path)}"

    def local_path(self, path: str) -> Path:
        """Return the local file of `path`. Raises `WarehouseError` if the warehouse is remote."""
        if not self.is_local:
            raise WarehouseError(f"{self.root} is not on this machine; use `downloaded` to get a local copy.")
        return Path(self.root, _checked(path))

    # -- reading ------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Whether the object is there. An object that is there is complete."""
        if self.is_local:
            return self.local_path(path).exists()
        return bool(self.remote.exists(self._key(path)))

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of files and folders directly in `folder`; none if it does not exist."""
        if self.is_local:
            local = self.local_path(folder)
            found = os.listdir(local) if local.is_dir() else []  # noqa: PTH208 - no Path objects for 1e5 names
        else:
            self.remote.invalidate_cache(self._key(folder))
            try:
                found = [PurePosixPath(str(p)).name for p in self.remote.ls(self._key(folder), detail=False)]
            except FileNotFoundError:
                found = []
        return sorted(name for name in found if name and not name.startswith("."))

    def read_bytes(self, path: str) -> bytes:
        """Return an object's bytes. Raises `FileNotFoundError` if it is not there."""
        if self.is_local:
            return self.local_path(path).read_bytes()
        return bytes(self.remote.cat_file(self._key(path)))

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Return a Parquet object as an Arrow table, `columns` only if given. Raises `KeyError` if one is not there."""
        with self.open_parquet(path) as parquet:  # a third faster on small files than `pq.read_table`
            table = parquet.read(columns)
        return table if columns is None else table.select(columns)

    def read_tables(self, paths: Iterable[str], schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
        """Return Parquet objects of one schema as one table, in the order given; empty if there are none."""
        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        tables = [self.read_table(path, columns) for path in paths]
        return pa.concat_tables(tables) if tables else wanted.empty_table()

    def open_parquet(self, path: str) -> pq.ParquetFile:
        """Open a Parquet object for reading in batches; close it when done."""
        return pq.ParquetFile(self._arrow_path(path), filesystem=self.arrow_filesystem, pre_buffer=not self.is_local)

    @contextmanager
    def downloaded(self, path: str) -> Iterator[Path]:
        """Give a local path of an object or folder: itself if local, else a copy that is removed afterwards."""
        if self.is_local:
            yield self.local_path(path)
            return
        with tempfile.TemporaryDirectory(prefix="tamis-") as folder:
            target = Path(folder, PurePosixPath(path).name)
            self.remote.get(self._key(path), str(target), recursive=self.remote.isdir(self._key(path)))
            yield target

    def check_writable(self) -> None:
        """Raise `WarehouseError` if nothing can be written to a local root; a remote one tells at the first object."""
        try:
            with self.workspace():
                pass
        except OSError as error:
            raise WarehouseError(
                f"{self.root}: can't be written to ({error.strerror}). Give a folder of yours as the warehouse."
            ) from None

    # -- writing ------------------------------------------------------------------------------------------

    @contextmanager
    def building(self, path: str) -> Iterator[Path]:
        """Give a temporary local file to fill; it becomes `path`, whole, when the block ends without an error.

        If `path` exists by then, it stays as it is: objects are named by what they depend on, so both are equal.
        """
        with self._temporary(path) as temporary:
            yield temporary
            self._publish(temporary, path)

    def create_bytes(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist yet. Returns False, changing nothing, if it does.

        Of several callers at once exactly one gets True; this is what snapshot numbers rest on.
        """
        with self._temporary(path) as temporary:
            temporary.write_bytes(data)
            return self._publish(temporary, path)

    def replace_bytes(self, path: str, data: bytes) -> None:
        """Write an object that may be replaced at any time, whole. Only the catalog is; all else is write-once."""
        if self.is_local:
            with self._temporary(path) as temporary:
                temporary.write_bytes(data)
                temporary.replace(self._made_parent(path))
        else:
            self.remote.pipe_file(self._key(path), data)

    def write_table(self, path: str, table: pa.Table) -> None:
        """Write a table as a Parquet object: row groups of about 64 MiB, same rows give the same bytes."""
        row_bytes = max(1, table.nbytes // max(1, table.num_rows))
        rows = max(1, min(122_880, ROW_GROUP_BYTES // row_bytes))
        with self.building(path) as temporary:
            pq.write_table(table, temporary, row_group_size=rows, **parquet_options(table.schema))

    def create_folder(self, path: str, source: Path) -> None:
        """Copy every file below the local folder `source` to `path`. Not atomic: name it by a record written after."""
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            with self.building(f"{path}/{file.relative_to(source).as_posix()}") as temporary:
                shutil.copyfile(file, temporary)

    def remove(self, path: str) -> None:
        """Delete an object; nothing happens if it is not there. Only expiry does: all else is kept for ever."""
        if self.is_local:
            self.local_path(path).unlink(missing_ok=True)
        elif self.exists(path):
            self.remote.rm_file(self._key(path))

    @contextmanager
    def locked(self, name: str, *, shared: bool) -> Iterator[None]:
        """Hold a lock among the processes of this machine, waiting for it. A remote warehouse has no locks."""
        if not self.is_local:
            yield
            return
        file = self._made_parent(f".work/locks/{name}")
        with file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield

    def remove_stale(self) -> int:
        """Delete what killed processes left under the temporary folder over a day ago; returns how many files."""
        folder = Path(self.root, TEMPORARY)
        if not self.is_local or not folder.is_dir():
            return 0
        limit = time.time() - STALE_AFTER_SECONDS
        stale = [p for p in folder.iterdir() if p.stat().st_mtime < limit]
        for entry in stale:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
        return len(stale)

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """Give an empty local folder for work in progress; removed afterwards, never visible as an object."""
        base = Path(self.root, TEMPORARY) if self.is_local else Path(tempfile.gettempdir())
        base.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=base))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # -- how ----------------------------------------------------------------------------------------------

    @cached_property
    def remote(self) -> Any:
        """The fsspec filesystem of a remote root; it remembers no listings, as other processes write too."""
        return fsspec.core.url_to_fs(self.root, use_listings_cache=False)[0]

    @cached_property
    def arrow_filesystem(self) -> pafs.FileSystem:
        """The root's filesystem for pyarrow."""
        return pafs.LocalFileSystem() if self.is_local else pafs.PyFileSystem(pafs.FSSpecHandler(self.remote))

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root}

    def __setstate__(self, state: dict[str, str]) -> None:
        object.__setattr__(self, "root", state["root"])

    def _key(self, path: str) -> str:
        return str(self.remote._strip_protocol(self.root)) + "/" + _checked(path)

    def _arrow_path(self, path: str) -> str:
        return str(self.local_path(path)) if self.is_local else self._key(path)

    @contextmanager
    def _temporary(self, path: str) -> Iterator[Path]:
        _checked(path)
        base = Path(self.root, TEMPORARY) if self.is_local else Path(tempfile.gettempdir())
        base.mkdir(parents=True, exist_ok=True)
        temporary = base / f"{uuid.uuid4().hex}{PurePosixPath(path).suffix}"
        try:
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _made_parent(self, path: str) -> Path:
        target = self.local_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _publish(self, temporary: Path, path: str) -> bool:
        if self.is_local:
            _flush_to_disk(temporary)
            try:
                os.link(temporary, self._made_parent(path))  # fails if the name is taken, unlike rename
            except FileExistsError:
                return False
            return True
        try:
            self.remote.put_file(str(temporary), self._key(path), mode="create")
        except FileExistsError:
            return False
        except OSError as error:  # some servers' "precondition failed" arrives as EINVAL
            if "pre-condition" in str(error).lower() or "precondition" in str(error).lower():
                return False
            raise
        return True


def _checked(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise WarehouseError(f"{path!r} is not a path inside the warehouse.")
    return path


def _flush_to_disk(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
