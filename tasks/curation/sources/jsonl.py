"""JSON Lines beside a folder of images: each line is an object that names an image file and has its caption."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tasks.curation.sources.columns import choose_columns, json_kinds
from tasks.curation.sources.contract import (
    MAX_TEXT_BYTES,
    Fault,
    Layout,
    RawSample,
    Reason,
    Row,
    RowError,
    SourceFile,
)
from tasks.curation.sources.files import ImageFolder, open_binary, parent_folder, read_ahead
from tasks.curation.sources.grouping import parse_object

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_jsonl(file: SourceFile) -> Iterator[Row]:
    """Yield one row a line, in order; blank lines are none. The key is the key column's value, or the image path.

    The first line that parses tells which fields are which. Raises `SourceError` if it does not.
    """
    images = ImageFolder(file.layout.image_folder or parent_folder(file.uri))

    def read(row: _WithoutImage | Fault) -> Row:
        if isinstance(row, Fault):
            return row
        try:
            return replace(row.sample, image=images.read(row.path))
        except RowError as error:
            return Fault.of(error, key=row.sample.key, member=row.sample.member)

    yield from read_ahead(_parsed(read_lines(file.uri), file.layout, file.uri), read, source=images.folder)


@dataclass(frozen=True)
class _WithoutImage:
    path: str
    sample: RawSample


def _parsed(lines: Iterable[tuple[int, bytes]], layout: Layout, uri: str) -> Iterator[_WithoutImage | Fault]:
    columns = None
    for number, line in lines:
        member, key = f"line {number}", None
        try:
            if len(line) > MAX_TEXT_BYTES:
                raise RowError(Reason.TOO_LARGE, f"the line has over {MAX_TEXT_BYTES:,} bytes")
            fields = parse_object(line)
            columns = columns or choose_columns(json_kinds(fields), layout, f"{uri}, {member}")
            path, key = fields.pop(columns.image, None), fields.pop(columns.key or "", None)
            key = None if key is None else str(key)
            if not isinstance(path, str) or not path:
                raise RowError(Reason.MISSING_IMAGE, f"{columns.image!r} is {path!r}")
            key = path if key is None else key
        except RowError as error:
            yield Fault.of(error, key=key, member=member, data=line)
            continue
        caption, url = fields.pop(columns.caption, None), fields.pop(columns.url or "", None)
        name = path.rsplit("/", 1)[-1]
        yield _WithoutImage(path, RawSample(key, member, None, name, caption, str(url) if url else None, fields))


def read_lines(uri: str) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not blank; of one that is too long, only the beginning."""
    with open_binary(uri) as file:
        number = 0
        while line := file.readline(MAX_TEXT_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > MAX_TEXT_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_TEXT_BYTES + 1)
            line = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
            if not line.isspace():
                yield number, line
