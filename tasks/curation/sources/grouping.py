"""Puts image, caption and JSON files of one name together, as WebDataset archives and folders hold samples."""

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks.curation.sources.contract import Fault, RawSample, Reason, Row, RowError

Role = Literal["image", "caption", "fields"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
ROLES: dict[str, Role] = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), ".txt": "caption", ".json": "fields"}
MAX_OPEN_SAMPLES = 8


@dataclass(frozen=True)
class Member:
    """A file of an archive or folder: its bytes, or why it has none."""

    name: str
    data: bytes | RowError


def role(name: str) -> Role | None:
    """Return what a file is to its sample: image, caption or fields; None for what is no part of one."""
    last = name.rpartition("/")[2]
    return None if last.startswith(".") else ROLES.get(posixpath.splitext(last)[1].lower())


def group_members(members: Iterable[Member | Fault]) -> Iterator[Row]:
    """Yield one row for the files of each name without its suffix; the name, folders included, is the key.

    As in WebDataset, files of a sample follow each other and names agree up to the first dot of the last part.
    Where several samples share that (`a.1.jpg`, `a.2.jpg`), up to `MAX_OPEN_SAMPLES` are held until the rest of
    them comes. The same file name again begins another sample under the same key.
    """
    waiting: dict[str, _Waiting] = {}
    prefix = ""
    for member in members:
        if isinstance(member, Fault):
            yield from _rows_of(waiting)
            yield member
            continue
        kind = role(member.name)
        if kind is None:
            if isinstance(member.data, RowError):
                yield Fault.of(member.data, key=None, member=member.name)
            continue
        key = posixpath.splitext(member.name.removeprefix("./"))[0]
        folder, slash, last = key.rpartition("/")
        if prefix != (prefix := folder + slash + last.partition(".")[0]):
            yield from _rows_of(waiting)
        earlier = waiting[key].parts.get(kind) if key in waiting else None
        if earlier and kind == "image" and earlier.name != member.name:
            data = member.data if isinstance(member.data, bytes) else None
            fault = Fault(key, member.name, Reason.EXTRA_IMAGE, f"{earlier.name} came first", data)
            waiting[key].faults.append(fault)
            continue
        if earlier:
            yield from waiting.pop(key).rows()
        if key not in waiting and len(waiting) == MAX_OPEN_SAMPLES:
            yield from waiting.pop(next(iter(waiting))).rows()
        waiting.setdefault(key, _Waiting(key)).parts[kind] = member
    yield from _rows_of(waiting)


def _rows_of(waiting: "dict[str, _Waiting]") -> Iterator[Row]:
    while waiting:
        yield from waiting.pop(next(iter(waiting))).rows()


@dataclass
class _Waiting:
    key: str
    parts: dict[str, Member] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def rows(self) -> Iterator[Row]:
        image = self.parts.get("image")
        name = (image or next(iter(self.parts.values()))).name
        data = image.data if image and isinstance(image.data, bytes) else None
        try:
            for part in self.parts.values():
                if isinstance(part.data, RowError):
                    name = part.name
                    raise part.data
            if image is None:
                raise RowError(Reason.MISSING_IMAGE, f"only {', '.join(part.name for part in self.parts.values())}")
            caption, fields = self._caption_and_fields()
            url = fields.pop("url", None)
            yield RawSample(
                self.key, name, data, posixpath.basename(name), caption, url if isinstance(url, str) else None, fields
            )
        except RowError as error:
            yield Fault.of(error, key=self.key, member=name, data=data)
        yield from self.faults

    def _caption_and_fields(self) -> tuple[object, dict[str, Any]]:
        fields = parse_object(self.parts["fields"].data) if "fields" in self.parts else {}
        if "caption" in self.parts:
            caption: object = self.parts["caption"].data
            if isinstance(caption, bytes) and caption.strip():
                if fields.get("caption") == caption.decode(errors="replace"):
                    del fields["caption"]
                return caption, fields
        return fields.pop("caption", None), fields


def parse_object(data: bytes | RowError) -> dict[str, Any]:
    """Return a JSON object's fields. Bytes that are not UTF-8 become lone surrogates, numbers like NaN None.

    Raises `RowError` with reason bad_json.
    """
    if isinstance(data, RowError):
        raise data
    try:
        parsed = json.loads(data.decode("utf-8", "surrogateescape"), parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise RowError(Reason.BAD_JSON, str(error)) from None
    if not isinstance(parsed, Mapping):
        raise RowError(Reason.BAD_JSON, f"a JSON object was expected, found a {type(parsed).__name__}")
    return dict(parsed)
