"""WebDataset archives: image, caption and JSON members read one after the other inside the tar or tar.gz.

Nothing is extracted: a member's name is text, and links, devices and folders are never followed.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from tasks.curation.sources.contract import (
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    Fault,
    Reason,
    Row,
    RowError,
    SourceFile,
)
from tasks.curation.sources.files import open_binary
from tasks.curation.sources.grouping import Member, group_members, role

STREAM_BYTES = 64 * 2**10
MAX_HEADER_BYTES = 2**20
"""Longest extended header (long names, PAX records) that is read into memory."""

_GZIP_MAGIC = b"\x1f\x8b"
_EXTENDED_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def read_webdataset(file: SourceFile) -> Iterator[Row]:
    """Yield the archive's samples in order; where it breaks off, one broken_archive fault ends it."""
    yield from group_members(_members(file))


def _members(file: SourceFile) -> Iterator[Member | Fault]:
    position = 0
    try:
        with _opened(file.uri) as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep a record of every member
                position = info.offset_data + info.size
                if not info.isdir():
                    yield Member(info.name, _data(archive, info))
            position = archive.offset
            if archive.ending is not None:
                raise tarfile.ReadError(f"no end-of-archive mark: {archive.ending}")
            while rest := archive.fileobj.read(STREAM_BYTES):  # to its end, where gzip has its checksum
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("there is more after the end-of-archive mark")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Fault(None, f"byte {position}", Reason.BROKEN_ARCHIVE, str(error) or type(error).__name__)


def _data(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes | RowError:
    kind = role(info.name)
    if not info.isreg() or info.issparse():
        what = f"link to {info.linkname}" if info.issym() or info.islnk() else "special file"
        return RowError(Reason.NOT_A_FILE, f"a {what} is not followed")
    if kind is None:
        return b""
    limit = MAX_IMAGE_BYTES if kind == "image" else MAX_TEXT_BYTES
    if info.size > limit:
        return RowError(Reason.TOO_LARGE, f"{info.size:,} bytes, over {limit:,}")
    content = archive.extractfile(info)
    return content.read() if content else b""


class _Archive(tarfile.TarFile):
    """A tar file that remembers why its list of members ended: None if by the mark that must be there."""

    ending: tarfile.TarError | None = None
    members: list[tarfile.TarInfo]
    fileobj: IO[bytes]


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED_HEADERS and header.size > MAX_HEADER_BYTES):
            raise tarfile.HeaderError(f"a header that says {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, archive: Any) -> "_Header":
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            archive.ending = None if isinstance(error, tarfile.EOFHeaderError) else error  # type: ignore[attr-defined]
            raise


@contextmanager
def _opened(uri: str) -> Iterator[_Archive]:
    with open_binary(uri) as raw:
        compressed = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        stream: IO[bytes] | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if compressed else raw
        with _Archive.open(
            mode="r|",
            fileobj=stream,  # type: ignore[arg-type]
            bufsize=STREAM_BYTES,
            tarinfo=_Header,
        ) as archive:
            yield archive  # type: ignore[misc]
