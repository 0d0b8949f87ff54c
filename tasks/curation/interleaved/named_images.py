"""The images that documents only name: files of a folder, or members of a tar."""

import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Protocol

from tasks.curation.sources.contract import MAX_IMAGE_BYTES, Reason, RowError, SourceError, SourceFile
from tasks.curation.sources.files import ImageFolder, file_exists, open_binary, parent_folder


class NamedImages(Protocol):
    """Gives an image's bytes by its name; raises `RowError` if they can't be had."""

    def read(self, name: str) -> bytes:
        """Return the bytes of the image `name`."""
        ...


@contextmanager
def open_images(file: SourceFile) -> Iterator[NamedImages]:
    """Give the images beside a source file: those of `image_folder`, a folder or tar, or of the tar of its name."""
    beside = f"{file.uri.rsplit('.', 1)[0]}.tar"
    place = file.layout.image_folder or (beside if file_exists(beside) else parent_folder(file.uri))
    if not place.endswith(".tar"):
        yield ImageFolder(place)
        return
    with open_binary(place) as raw:
        yield ImageArchive(raw, place)


class ImageArchive:
    """Members of a tar that is not compressed, by name. Links are never followed. Threads may share one."""

    def __init__(self, raw: IO[bytes], uri: str) -> None:
        self._raw, self._uri, self._lock = raw, uri, threading.Lock()
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(fileobj=raw, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    if member.isreg() and not member.issparse():
                        self._places[member.name.removeprefix("./")] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            if not self._places:  # where it breaks off, what came before is used
                raise SourceError(f"{uri}: {error}. Give a tar that is not compressed as image_folder.") from None

    def read(self, name: str) -> bytes:
        """Return a member's bytes. Raises `RowError`: missing_file, too_large or truncated."""
        if (place := self._places.get(name.removeprefix("./"))) is None:
            raise RowError(Reason.MISSING_FILE, f"{self._uri} has no file {name}")
        start, size = place
        if size > MAX_IMAGE_BYTES:
            raise RowError(Reason.TOO_LARGE, f"{name} has {size:,} bytes, over {MAX_IMAGE_BYTES:,}")
        with self._lock:
            self._raw.seek(start)
            data = self._raw.read(size)
        if len(data) < size:
            raise RowError(Reason.TRUNCATED, f"{self._uri} ends inside {name}")
        return data
