"""Turns Arrow batches into rows; shared by Parquet files and Hugging Face datasets."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tasks.curation.sources.columns import Columns, arrow_kind
from tasks.curation.sources.contract import Fault, RawSample, Reason, Row, RowError
from tasks.curation.sources.files import ImageFolder, read_ahead

BATCH_ROWS = 32
"""Rows taken out of Arrow at once: few, because all images of a batch are in memory."""


def batch_rows(batch: pa.RecordBatch, columns: Columns, images: ImageFolder, first_row: int) -> Iterator[Row]:
    """Yield a batch's rows in order, with members named `row <number>` from `first_row` on.

    Images that the row only names are read from `images`; the path is then the key, if there is no key column.
    An image that is null although its row has a `status` other than success, as img2dataset writes it, is a
    download_failed fault.
    """
    data, paths = _images(batch.column(columns.image))
    wanted = [columns.key, columns.url, columns.caption, *columns.others]
    values = {name: _values(batch.column(name)) for name in wanted if name is not None}

    def read(index: int) -> Row:
        fields = {name: values[name][index] for name in columns.others}
        key, url = (None if name is None else values[name][index] for name in (columns.key, columns.url))
        path, member = paths[index], f"row {first_row + index}"
        key = path if key is None else str(key)
        try:
            image = images.read(path) if data[index] is None and path else data[index]
            if image is None:
                raise _absence(fields)
            if not isinstance(image, bytes):
                raise RowError(Reason.NOT_AN_IMAGE, f"the image is a {type(image).__name__}")
        except RowError as error:
            return Fault.of(error, key=key, member=member)
        name = path.rsplit("/", 1)[-1] if path else None
        return RawSample(key, member, image, name, values[columns.caption][index], url, fields)

    by_path = any(path and image is None for image, path in zip(data, paths, strict=True))
    rows = range(batch.num_rows)
    yield from read_ahead(rows, read, source=images.folder) if by_path else map(read, rows)


def _images(column: pa.Array) -> tuple[list[Any], list[str | None]]:
    """Return bytes and path of each image: from structs of both, from bytes alone, or from paths alone.

    In place of the bytes there is what a column of another type holds.
    """
    nothing: list[Any] = [None] * len(column)
    if arrow_kind(column.type) == "image":
        return _values(pc.struct_field(column, "bytes")), _values(pc.struct_field(column, "path"))
    if arrow_kind(column.type) == "text":
        return nothing, _values(column)
    return _values(column), nothing


def _values(column: pa.Array) -> list[Any]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if arrow_kind(column.type) != "text":
        return [_value(scalar) for scalar in column]
    # Arrow does not check that text is UTF-8; what is not comes out as lone surrogates, as from JSON.
    raw = pc.cast(column, pa.large_binary()).to_pylist()
    return [None if value is None else value.decode("utf-8", "surrogateescape") for value in raw]


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):  # text inside a list that is not UTF-8, a date past year 9999
        return None


def _absence(fields: Mapping[str, Any]) -> RowError:
    if (status := fields.get("status")) not in (None, "success"):
        return RowError(Reason.DOWNLOAD_FAILED, f"{status}: {fields.get('error_message')}")
    return RowError(Reason.MISSING_IMAGE, "the image is null")
