"""Finds which columns of a table, or fields of a JSON object, hold the image, the caption and the key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from tasks.curation.sources.contract import Layout, SourceError

Kind = Literal["bytes", "image", "text", "number", "other"]
"""What a column holds; `image` is the struct of bytes and path that `datasets` stores images as."""

# Names by preference: a name in an earlier row wins; two names of one row are ambiguous.
IMAGE_NAMES = (("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "picture"),)
PATH_NAMES = (("image_path",), ("file_name", "filename", "image_file", "img_path", "image"), ("path", "file"))
CAPTION_NAMES = (("caption",), ("text", "txt"), ("alt_text", "alt", "description", "sentence"))
KEY_NAMES = (("key", "__key__"), ("id", "uid"), ("sample_id",), ("image_id",))
URL_NAMES = (("url",), ("image_url", "img_url"))


@dataclass(frozen=True)
class Columns:
    """The columns to read; `kind` is the image column's. `others` become metadata."""

    image: str
    kind: Kind
    caption: str
    key: str | None
    url: str | None
    others: tuple[str, ...]


def choose_columns(kinds: Mapping[str, Kind], layout: Layout, where: str) -> Columns:
    """Return the columns the user named, or else those that their types and usual names single out.

    `kinds` has every column in order. An image or caption column of the usual name and a wrong type is taken too, and
    then every row is at fault, not the source. Raises `SourceError`, naming the columns, where none or several fit.
    """
    listing = ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"
    for option in ("image_column", "caption_column", "key_column"):
        if (named := getattr(layout, option)) is not None and named not in kinds:
            raise SourceError(f"{where}: there is no column {named!r}, given as {option}. Columns: {listing}.")

    def choose(what: str, candidates: Sequence[str], names: Sequence[Sequence[str]]) -> str | None:
        for row in names:
            if len(fitting := [name for name in candidates if name.lower() in row]) == 1:
                return fitting[0]
            if fitting:
                raise SourceError(
                    f"{where}: {' and '.join(fitting)} could each be the {what}. "
                    f"Choose with {what}_column. Columns: {listing}."
                )
        return None

    texts = [name for name, kind in kinds.items() if kind == "text"]
    untyped = [name for name, kind in kinds.items() if kind in ("number", "other")]
    inline = [name for name, kind in kinds.items() if kind in ("bytes", "image")]
    image = layout.image_column or choose("image", inline, IMAGE_NAMES)
    image = image or (inline[0] if len(inline) == 1 else choose("image", texts, PATH_NAMES))
    image = image or choose("image", untyped, IMAGE_NAMES + PATH_NAMES[:2])
    if image is None or (layout.image_column and image in untyped):
        raise SourceError(
            f"{where}: {'found no image column' if image is None else f'{image!r} can not hold images'}. Give "
            f"image_column: one with bytes, with structs of bytes and path, or with paths. Columns: {listing}."
        )
    key = layout.key_column or choose("key", [n for n, k in kinds.items() if k in ("text", "number")], KEY_NAMES)
    url = choose("url", texts, URL_NAMES)
    caption = layout.caption_column or choose("caption", [n for n in texts if n != image], CAPTION_NAMES)
    caption = caption or choose("caption", [n for n in kinds if n != image], CAPTION_NAMES[:1])
    if caption is None:
        named = {name for names in (PATH_NAMES, KEY_NAMES, URL_NAMES) for row in names for name in row}
        left = [name for name in texts if name not in (image, key, url) and name.lower() not in named]
        if len(left) != 1:
            raise SourceError(f"{where}: found no caption column. Give caption_column. Columns: {listing}.")
        caption = left[0]
    others = tuple(name for name in kinds if name not in (image, key, url, caption))
    return Columns(image, kinds[image], caption, key, url, others)


def arrow_kinds(schema: pa.Schema) -> dict[str, Kind]:
    """Return what each column of an Arrow schema holds."""
    return {field.name: arrow_kind(field.type) for field in schema}


def arrow_kind(kind: pa.DataType) -> Kind:
    """Return what a column of an Arrow type holds."""
    if pa.types.is_dictionary(kind):
        return arrow_kind(kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return "bytes"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return "number"
    if pa.types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} == {"bytes", "path"}:
        return "image"
    return "other"


def json_kinds(fields: Mapping[str, object]) -> dict[str, Kind]:
    """Return what each field of a JSON object holds."""
    return {name: _json_kind(value) for name, value in fields.items()}


def _json_kind(value: object) -> Kind:
    if isinstance(value, str):
        return "text"
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else "other"
