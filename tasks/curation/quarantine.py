"""Rows of quarantine: what a source held that can't be used, where it was, why, and what its bytes were."""

import hashlib
from collections import Counter
from typing import Any

from storage.fingerprint import canonical_json
from storage.schema import QUARANTINE
from storage.warehouse import Warehouse
from tasks.curation.sources.contract import Fault
from tasks.curation.sources.text import valid_text

MAX_DETAIL_CHARACTERS = 500


def quarantine_reasons(warehouse: Warehouse, pool: str) -> str:
    """Return the reasons in a pool's quarantine with their counts, the most frequent first; empty if it is empty.

    A source that was ingested from two places counts once.
    """
    paths = [f"quarantine/{pool}/{name}" for name in warehouse.names(f"quarantine/{pool}")]
    rows = warehouse.read_tables(paths, QUARANTINE, ["source", "reason", "digest"]).to_pylist()
    faults = {(row["source"]["member"], row["reason"], row["digest"]) for row in rows}
    reasons = Counter(sorted(reason for _, reason, _ in faults))
    return ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())


def quarantine_row(fault: Fault, path: str) -> dict[str, Any]:
    """Return the row of `schema.QUARANTINE` for a fault in the source file `path`.

    Its id is that of the place, the reason and the bytes, so that the same fault found again is the same row.
    """
    digest = None if fault.data is None else hashlib.sha256(fault.data).hexdigest()
    source = {"path": valid_text(path), "member": valid_text(fault.member)}
    identity = canonical_json([source, fault.reason.value, digest])
    return {
        "quarantine_id": hashlib.sha256(identity.encode()).hexdigest()[:32],
        "key": None if fault.key is None else valid_text(fault.key),
        "source": source,
        "reason": fault.reason.value,
        "detail": valid_text(fault.detail)[:MAX_DETAIL_CHARACTERS],
        "digest": digest,
        "size": None if fault.data is None else len(fault.data),
    }
