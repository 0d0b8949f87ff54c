"""Records: the small JSON object written last beside a step's output, which makes the output count as done."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from storage.warehouse import Warehouse


@dataclass(frozen=True)
class Record:
    """What a step did: enough to tell why its output exists and to repeat it.

    `config` and `inputs` are what the output's fingerprint covers; `counts` are rows in and out by name.
    """

    step: str
    fingerprint: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    code_version: str = field(default_factory=lambda: version("tamis"))


def write_record(warehouse: Warehouse, path: str, record: Record) -> bool:
    """Write `record` as JSON at `path`; returns False if one is there already, which then stands."""
    return warehouse.create_bytes(path, json.dumps(asdict(record), indent=1, sort_keys=True).encode())


def read_record(warehouse: Warehouse, path: str) -> Record | None:
    """Return the record at `path`, or None if the step has not finished."""
    try:
        data = warehouse.read_bytes(path)
    except FileNotFoundError:
        return None
    return Record(**json.loads(data))
