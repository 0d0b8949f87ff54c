"""What every format's reader takes and yields: a source file in, rows in the source's own order out.

A row is a `RawSample`, bytes as they came, or a `Fault` that says why there is none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

Format = Literal["webdataset", "folder", "parquet", "jsonl", "huggingface"]

MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 16 * 2**20
"""Longest caption file, JSON file or JSONL line that is read into memory."""


class Reason(StrEnum):
    """Why a row is in quarantine."""

    BAD_DOCUMENT = "bad_document"
    """The row's texts and images do not make an interleaved document."""
    BAD_JSON = "bad_json"
    """The row's JSON can't be parsed, or is not an object."""
    BROKEN_ARCHIVE = "broken_archive"
    """The tar or Parquet file breaks off or is damaged here; rows before the break are kept."""
    CAPTION_NOT_TEXT = "caption_not_text"
    """The caption is a number, list or object."""
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    """The caption's bytes are not UTF-8."""
    CORRUPT = "corrupt"
    """All the image's bytes are there, but they can't be decoded."""
    DECOMPRESSION_BOMB = "decompression_bomb"
    """The image's header announces more pixels than `image_check.MAX_PIXELS`."""
    DOWNLOAD_FAILED = "download_failed"
    """The source records that the image was never downloaded."""
    EMPTY = "empty"
    """The image has no bytes at all."""
    EXTRA_IMAGE = "extra_image"
    """A second image under a key that has one."""
    MISSING_CAPTION = "missing_caption"
    """There is no caption, or nothing but white space."""
    MISSING_FILE = "missing_file"
    """The image file named by the row does not exist or can't be opened."""
    MISSING_IMAGE = "missing_image"
    """The row has no image."""
    NOT_A_FILE = "not_a_file"
    """A link or device in an archive; they are never followed."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes are no image format that can be read."""
    OUTSIDE_SOURCE = "outside_source"
    """The row names an image file outside the source's image folder."""
    TOO_LARGE = "too_large"
    """More bytes than `MAX_IMAGE_BYTES`, or `MAX_TEXT_BYTES` for text."""
    TRUNCATED = "truncated"
    """The image ends before its format says it does."""


class SourceError(ValueError):
    """A source can't be read as asked; the message says what was found and what to give instead."""


class RowError(Exception):
    """One row can't become a sample. Readers catch it and yield a `Fault`; `path` is the file that was missing."""

    def __init__(self, reason: Reason, detail: str, path: str | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.path = reason, detail, path


@dataclass(frozen=True)
class Layout:
    """How a source names things, where that can't be told from the source itself.

    Columns are those of Parquet, JSONL and Hugging Face datasets. `image_folder` is what paths in the source are
    relative to and may not lead out of; by default the folder the source file is in.
    """

    image_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    image_folder: str | None = None


@dataclass(frozen=True)
class SourceFile:
    """One unit of ingestion: a tar, a Parquet or JSONL file, a folder of images, or one split of a dataset.

    `version` changes when the content may have: modification time in ns, entity tag, or a hash over a listing.
    """

    uri: str
    format: Format
    size: int
    version: str
    layout: Layout = field(default_factory=Layout)

    @property
    def name(self) -> str:
        """The last part of its path, for people."""
        return self.uri.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class RawSample:
    """A row as the source holds it; nothing about it has been checked.

    `key` is None if the source has no keys. `member` says where in the source file the row is. `metadata` are
    all fields without a column of their own.
    """

    key: str | None
    member: str
    image: bytes | None
    image_name: str | None
    caption: object
    url: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> bytes | None:
        """The bytes that a fault of this row is known by."""
        return self.image


@dataclass(frozen=True)
class Fault:
    """A row that can't become a sample. `data` are the bytes at fault, if any were read."""

    key: str | None
    member: str
    reason: Reason
    detail: str
    data: bytes | None = None
    missing_path: str | None = None

    @classmethod
    def of(cls, error: RowError, *, key: str | None, member: str, data: bytes | None = None) -> "Fault":
        """Return the fault that `error` is at a place in the source."""
        return cls(key, member, error.reason, error.detail, data, error.path)


Row = RawSample | Fault
