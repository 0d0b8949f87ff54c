"""Opening source files, and reading the image files that a source only names, several at a time."""

import errno
import io
import os
import posixpath
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

import fsspec

from tasks.curation.sources.contract import MAX_IMAGE_BYTES, Reason, RowError

LOCAL_READERS, REMOTE_READERS = 2, 8
"""Files of one source that are read at once: many hide the latency of object storage, and are in each other's way on a
local disk, where a file takes less time than a turn of the interpreter."""

HANDED_OUT = 32
"""Files that these threads have in hand together."""

BUFFER_BYTES = 2**20

T = TypeVar("T")
R = TypeVar("R")

_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP}


def is_local(uri: str) -> bool:
    """Whether `uri` is a path of this machine and not a URL."""
    return "://" not in uri


def open_binary(uri: str) -> IO[bytes]:
    """Open a local path or URL for reading from the start, buffered."""
    if is_local(uri):
        return Path(uri).open("rb")
    return io.BufferedReader(fsspec.open(uri, "rb").open(), BUFFER_BYTES)


def parent_folder(uri: str) -> str:
    """Return the folder that `uri` is in."""
    return uri.rsplit("/", 1)[0] or "/"


def file_exists(uri: str) -> bool:
    """Whether there is a file at a local path or URL now."""
    if is_local(uri):
        return Path(uri).exists()
    filesystem, path = fsspec.core.url_to_fs(uri)
    filesystem.invalidate_cache(parent_folder(path))
    return bool(filesystem.exists(path))


def image_is_there(uri: str) -> bool:
    """Whether an image file at a local path or URL can be read now: a folder or a pipe of its name is none."""
    return Path(uri).is_file() and os.access(uri, os.R_OK) if is_local(uri) else file_exists(uri)


class ImageFolder:
    """Image files that rows name by path. What a row names can't lead out of the folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder.rstrip("/")

    def read(self, name: str, limit: int = MAX_IMAGE_BYTES) -> bytes:
        """Return the bytes of a file, `name` relative to the folder or an absolute path or URL inside it.

        Raises `RowError`: outside_source, missing_file (also for what may not be opened) or too_large. Other
        errors, such as a lost connection, pass through: the row is not at fault.
        """
        path = self._resolve(name)
        try:
            return _read_local(path, limit) if is_local(path) else _read_remote(path, limit)
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError) or error.errno in _ABSENT:
                raise RowError(Reason.MISSING_FILE, f"{path}: {error.strerror or error}", path) from None
            raise

    def _resolve(self, name: str) -> str:
        if "\0" in name:
            raise RowError(Reason.MISSING_FILE, f"{name!r} is not a file name")
        if "://" in name:
            path = name
        elif is_local(self.folder):
            path = posixpath.normpath(posixpath.join(self.folder or "/", name))
        else:
            scheme, rest = self.folder.split("://", 1)
            path = f"{scheme}://{posixpath.normpath(posixpath.join(rest, name))}"
        if not path.startswith(f"{self.folder}/") or ".." in path.split("/"):
            raise RowError(
                Reason.OUTSIDE_SOURCE,
                f"{name} is outside {self.folder or '/'}; if it belongs to the source, give a higher image_folder",
            )
        return path


def _read_local(path: str, limit: int) -> bytes:
    """Read a file in three calls: after each one, a thread must wait for the interpreter again."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for ever
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise RowError(Reason.MISSING_FILE, f"{path} is not a regular file", path)
        if status.st_size > limit:
            raise RowError(Reason.TOO_LARGE, f"{path} has {status.st_size:,} bytes, over {limit:,}")
        return os.read(file, status.st_size)
    finally:
        os.close(file)


def _read_remote(uri: str, limit: int) -> bytes:
    filesystem, path = fsspec.core.url_to_fs(uri)
    size = filesystem.info(path)["size"] or 0
    if size > limit:
        raise RowError(Reason.TOO_LARGE, f"{uri} has {size:,} bytes, over {limit:,}")
    return bytes(filesystem.cat_file(path))


def read_ahead(items: Iterable[T], read: Callable[[T], R], *, source: str, handed_out: int = HANDED_OUT) -> Iterator[R]:
    """Yield `read(item)` in order while threads work on the items that follow; memory holds a few times `handed_out`.

    `source` is where `read` reads: a local path or a URL. A thread takes some items together, as handing over one takes
    as long as reading a small file.
    """
    readers = LOCAL_READERS if is_local(source) else REMOTE_READERS
    waiting = iter(items)

    def read_all(some: tuple[T, ...]) -> list[R]:
        return [read(item) for item in some]

    with ThreadPoolExecutor(readers) as threads:
        pending: deque[Future[list[R]]] = deque()
        try:
            while some := tuple(islice(waiting, handed_out // readers)):
                pending.append(threads.submit(read_all, some))
                if len(pending) > readers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
