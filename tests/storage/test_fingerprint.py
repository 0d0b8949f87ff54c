import hashlib
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
from pydantic import BaseModel

from storage.fingerprint import FingerprintError, canonical_json, fingerprint, folder_digest


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Point:
    x: int
    y: float


class Settings(BaseModel):
    name: str
    limit: float | None = None


def test_is_the_sha256_of_sorted_compact_json() -> None:
    value = {"b": [1, 2.5, None], "a": "é"}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert fingerprint(value) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_order_of_keys_does_not_matter_but_order_of_items_does() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_dataclasses_models_and_enums_count_by_content() -> None:
    assert canonical_json([Point(1, 2.0), Settings(name="x"), Colour.RED]) == (
        '[{"x":1,"y":2.0},{"limit":null,"name":"x"},"red"]'
    )


@pytest.mark.parametrize("value", [{1, 2}, Path("x"), object(), lambda: None, b"bytes", {1: "a"}, float("nan")])
def test_refuses_what_has_no_stable_text_and_says_where(value: object) -> None:
    with pytest.raises(FingerprintError, match=r"value\.outer\[1\]"):
        fingerprint({"outer": [0, value]})


def test_folder_digest_sees_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    before = folder_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    renamed = folder_digest(tmp_path)
    (tmp_path / "b").write_text("2")
    assert len({before, renamed, folder_digest(tmp_path)}) == 3
