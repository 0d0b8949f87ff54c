"""Readers of interleaved documents: JSON Lines as MMC4 has them, and texts beside images as OBELICS has them.

MMC4: `text_list` and `image_info`, whose images stand before the text of their `matched_text_index`. OBELICS: lists
`texts` and `images` of one length, None in the one where the other has something; both as JSON Lines or Parquet.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.interleaved.named_images import NamedImages, open_images
from tasks.curation.sources.contract import MAX_TEXT_BYTES, Fault, Reason, RowError, SourceError, SourceFile
from tasks.curation.sources.files import open_binary, read_ahead
from tasks.curation.sources.find import find_source_files
from tasks.curation.sources.grouping import parse_object
from tasks.curation.sources.jsonl import read_lines

BATCH_ROWS = 8
"""Documents in hand at once: few, because all their images are in memory."""

KEY_NAMES = ("key", "document_id", "doc_id", "id", "url")
MAX_SEGMENTS = 4_096
"""Most segments of a document: to assign 2,048 images to as many texts takes two seconds, and grows with the cube."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class RawSegment:
    """A text, or an image that the source holds (bytes), names (a path or URL) or says is missing."""

    text: str | None = None
    image: bytes | RowError | None = None
    path: str | None = None
    url: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Whether it is a text."""
        return self.text is not None


@dataclass(frozen=True)
class RawDocument:
    """A document as the source holds it; its images have not been checked. `key` is None if the source has none."""

    key: str | None
    member: str
    segments: tuple[RawSegment, ...]
    metadata: Mapping[str, Any]


Row = RawDocument | Fault


def find_document_files(
    source: str, *, key_column: str | None = None, image_folder: str | None = None
) -> list[SourceFile]:
    """Return the JSONL and Parquet files of documents at `source`, sorted by name; see `find_source_files`.

    `image_folder` is a folder, or a tar, that has the images which documents only name; by default the tar of the same
    name beside the file (`a.tar` for `a.jsonl`), else the folder that the file is in. Raises `SourceError`.
    """
    found = find_source_files(source, key_column=key_column, image_folder=image_folder)
    files = [file for file in found if file.format in ("jsonl", "parquet")]
    if not files:
        raise SourceError(f"{source}: found no documents. Expected .jsonl or .parquet files of texts and images.")
    return files


def read_documents(file: SourceFile) -> Iterator[Row]:
    """Yield the file's documents in its own order, those that can't be read as faults.

    An image that can't be read stays in its place, with the reason; nothing is downloaded.
    """
    with open_images(file) as images:
        rows = _jsonl(file) if file.format == "jsonl" else _parquet(file)
        yield from read_ahead(rows, partial(_with_images, images=images), source=file.uri, handed_out=BATCH_ROWS)


# -- rows -----------------------------------------------------------------------------------------------------


def _jsonl(file: SourceFile) -> Iterator[Row]:
    for number, line in read_lines(file.uri):
        if len(line) > MAX_TEXT_BYTES:
            yield Fault(None, f"line {number}", Reason.TOO_LARGE, f"over {MAX_TEXT_BYTES:,} bytes", line)
            continue
        yield _document(partial(parse_object, line), f"line {number}", file, line)


def _parquet(file: SourceFile) -> Iterator[Row]:
    row = 0
    with open_binary(file.uri) as raw:
        try:
            for batch in pq.ParquetFile(raw, pre_buffer=False).iter_batches(BATCH_ROWS, use_threads=False):
                for at in range(batch.num_rows):
                    yield _document(partial(_row_fields, batch, at), f"row {row}", file, None)
                    row += 1
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
                raise  # the disk or the network failed, not the file
            yield Fault(None, f"row {row}", Reason.BROKEN_ARCHIVE, str(error))


def _row_fields(batch: pa.RecordBatch, at: int) -> Fields:
    try:
        return {name: batch.column(name)[at].as_py() for name in batch.schema.names}
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a date past year 9999
        raise RowError(Reason.BAD_DOCUMENT, str(error)) from None


def _document(read: Callable[[], Fields], member: str, file: SourceFile, data: bytes | None) -> Row:
    key = None
    try:
        fields = read()
        key = _key(fields, file.layout.key_column)
        segments = _mmc4(fields) if "text_list" in fields else _obelics(fields)
        if not 0 < len(segments) <= MAX_SEGMENTS:
            raise RowError(Reason.BAD_DOCUMENT, f"{len(segments)} segments; from 1 to {MAX_SEGMENTS:,} can be read")
        return RawDocument(key, member, tuple(segments), fields)
    except RowError as error:
        return Fault.of(error, key=key, member=member, data=data)


def _key(fields: Fields, column: str | None) -> str | None:
    """The value of the key column or the first usual name, else the page's address in `general_metadata`."""
    for name in (column,) if column else KEY_NAMES:
        if isinstance(value := fields.get(name), str | int) and not isinstance(value, bool):
            return str(value)
    general = _parsed(fields.get("general_metadata"))
    return str(general["url"]) if isinstance(general, dict) and "url" in general else None


def _mmc4(fields: Fields) -> list[RawSegment]:
    """Texts in order, each after the images matched to it; images matched to none come last."""
    texts, images = _list(fields, "text_list"), _list(fields, "image_info")
    before: list[list[RawSegment]] = [[] for _ in range(len(texts) + 1)]
    for info in images:
        if not isinstance(info, Mapping):
            raise RowError(Reason.BAD_DOCUMENT, f"image_info holds a {type(info).__name__}")
        index = info.get("matched_text_index")
        place = index if isinstance(index, int) and 0 <= index < len(texts) else len(texts)
        name, url = info.get("image_name"), info.get("raw_url")
        others = {name: value for name, value in info.items() if name not in ("image_name", "raw_url")}
        image = _image(name if name is not None else url, others)
        before[place].append(replace(image, url=str(url) if url else image.url))
    fields.pop("similarity_matrix", None)  # of other images and another model than those measured here
    placed = [[*images, _text(text, at)] for at, (images, text) in enumerate(zip(before, texts, strict=False))]
    return [segment for part in placed for segment in part] + before[-1]


def _obelics(fields: Fields) -> list[RawSegment]:
    """Texts and images of parallel lists; where both are None an image is missing."""
    texts, images = _list(fields, "texts"), _list(fields, "images")
    if len(texts) != len(images):
        raise RowError(Reason.BAD_DOCUMENT, f"{len(texts)} texts beside {len(images)} images")
    about = _parsed(fields.get("metadata"))
    described: Sequence[Any] = about if isinstance(about, list) and len(about) == len(images) else [None] * len(images)
    if about is described:
        fields.pop("metadata")
    segments = []
    for at, (text, image, of_image) in enumerate(zip(texts, images, described, strict=True)):
        if image is not None or text is None:
            segments.append(_image(image, of_image if isinstance(of_image, dict) else {}))
        if text is not None:
            segments.append(_text(text, at))
    return segments


def _list(fields: Fields, name: str) -> list[Any]:
    value = fields.pop(name, None)
    if not isinstance(value, list):
        expected = "text_list and image_info, or texts and images"
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise RowError(Reason.BAD_DOCUMENT, f"{name} {found}; documents have lists {expected}")
    return value


def _text(value: object, at: int) -> RawSegment:
    if not isinstance(value, str):
        raise RowError(Reason.BAD_DOCUMENT, f"text {at} is a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeError as error:
        raise RowError(Reason.BAD_DOCUMENT, f"text {at} is not UTF-8: {error}") from None
    return RawSegment(text=value)


def _image(value: object, metadata: Mapping[str, Any]) -> RawSegment:
    """An image given as bytes, as struct of bytes and path, or as path or URL."""
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, None)
    if isinstance(data, str):
        data, path = None, data
    if not isinstance(data, bytes | None) or not isinstance(path, str | None):
        raise RowError(Reason.BAD_DOCUMENT, f"an image is a {type(data).__name__}, its path a {type(path).__name__}")
    return RawSegment(image=data, path=path or None, url=path if path and "://" in path else None, metadata=metadata)


def _parsed(value: object) -> Any:
    """What a field that holds JSON as text says; itself if it is none."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


# -- images ---------------------------------------------------------------------------------------------------


def _with_images(row: Row, images: NamedImages) -> Row:
    if isinstance(row, Fault):
        return row
    return replace(row, segments=tuple(_read(segment, images) for segment in row.segments))


def _read(segment: RawSegment, images: NamedImages) -> RawSegment:
    if segment.is_text or segment.image is not None:
        return segment
    try:
        if segment.path is None:
            raise RowError(Reason.MISSING_IMAGE, "the source has no image here")
        return replace(segment, image=images.read(segment.path))
    except RowError as error:
        if error.reason is Reason.OUTSIDE_SOURCE and segment.url == segment.path:
            error = RowError(Reason.MISSING_IMAGE, f"only its address is here, {segment.url}; nothing is downloaded")
        return replace(segment, image=error)
