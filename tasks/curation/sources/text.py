"""Makes text of what sources hold, so that Arrow and JSON readers can take it: valid UTF-8, finite numbers."""

import base64
import json
import math
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any

from tasks.curation.sources.contract import Reason, RowError


def caption_text(value: object) -> str:
    """Return a caption as it came, if it is one. Raises `RowError`: missing_caption, caption_not_text or _not_utf8."""
    if value is None:
        raise RowError(Reason.MISSING_CAPTION, "there is no caption")
    if not isinstance(value, str | bytes):
        raise RowError(Reason.CAPTION_NOT_TEXT, f"the caption is a {type(value).__name__}")
    try:
        caption = value.decode() if isinstance(value, bytes) else value.encode().decode()
    except UnicodeError as error:
        raise RowError(Reason.CAPTION_NOT_UTF8, str(error)) from None
    if not caption or caption.isspace():
        raise RowError(Reason.MISSING_CAPTION, "the caption is empty")
    return caption


def valid_text(value: str) -> str:
    """Return `value` with what UTF-8 can't hold (lone surrogates: bytes that were not UTF-8) written as `\\udc..`."""
    return value.encode("utf-8", "backslashreplace").decode()


def metadata_json(fields: Mapping[str, Any]) -> str | None:
    """Return a row's other fields as a JSON object, or None if there are none.

    Bytes become base64, dates ISO 8601, numbers that JSON lacks null. Raises `RowError` if nested too deep.
    """
    if not fields:
        return None
    try:
        text = json.dumps(_plain(fields), ensure_ascii=False, separators=(",", ":"))
    except RecursionError:
        raise RowError(Reason.BAD_JSON, "nested too deep") from None
    return text.encode("utf-8", "replace").decode()  # an escaped surrogate would be refused by JSON readers


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, datetime | date | time) else str(value)
