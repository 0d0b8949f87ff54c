"""Publishing: a decision becomes a numbered snapshot of self-contained shards.

Files are named by what they hold, so shards that did not change since the last snapshot are shared; the manifest,
written last, is what makes them a snapshot.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from storage.record import read_record
from storage.refs import DecisionsRef, Outcome, PairsRef, PoolRef, ShardRef, SignalRef, SnapshotRef
from storage.schema import DECISIONS, PUBLISHED
from storage.snapshot import Draft, Manifest, commit
from storage.warehouse import Warehouse, check_name
from tasks.curation.columns import EvidenceError, find_columns
from tasks.curation.decide import decisions_ref
from tasks.curation.duplicates import read_evidence
from tasks.curation.parallel import in_order
from tasks.curation.policy import SPLIT_CONFLICT, Policy
from tasks.curation.snapshot_files import SnapshotFiles, Verdicts
from tasks.curation.splits import SPLITS, assign_splits

READERS = 8
WRITERS = 2
"""Shards of images copied at once; each holds up to two row groups of them in memory."""


def publish(
    dataset: str,
    pool: PoolRef,
    decisions: DecisionsRef,
    policy: Policy,
    signals: Sequence[SignalRef],
    pairs: Sequence[PairsRef],
    *,
    evaluation_pools: Sequence[PoolRef] = (),
    warehouse: Warehouse,
    blur_faces: bool = False,
) -> Outcome[SnapshotRef]:
    """Publish what was decided as the next snapshot of `dataset`; cached if the latest one is the same.

    Curated shards hold the kept samples with their split and the signals' scalar columns. Samples that would have to
    change their split (see `assign_splits`) are left out, and say so in the published decisions: not kept, failed
    `split_conflict`. With `blur_faces`, images in which the signal `faces` found any are published with these blurred
    (see `face_blur`), and the column `faces_blurred` says how many; all other images keep their bytes, as the pool
    does. May be called by several at once, and again after being killed.

    Raises `EvidenceError` if the decisions were not made from these inputs, or faces are to be blurred that were not
    looked for.
    """
    check_name(dataset, "dataset")
    faces = _find_faces(signals) if blur_faces else None
    record = read_record(warehouse, decisions.record)
    if record is None or decisions != decisions_ref(pool, policy, signals, pairs, evaluation_pools):
        raise EvidenceError(
            f"{decisions.folder} does not hold the decisions of policy {policy.name} on pool {pool.name} with these "
            "signals and pairs. Call decide with the same ones first."
        )
    columns = find_columns(pool, signals, warehouse=warehouse)
    decided = _read_decisions(pool, decisions, warehouse)
    ids, kept = _columns(decided, "sample_id"), _columns(decided, "kept")
    evidence, _ = read_evidence(pairs, sample_ids=ids, warehouse=warehouse)

    def build(parent: Manifest | None) -> Draft:
        earlier = [parent.published.path] if parent and parent.published else []
        published = warehouse.read_tables(earlier, PUBLISHED).cast(PUBLISHED)
        split = assign_splits(ids.filter(kept), evidence=evidence, published=published, splits=policy.splits)
        verdicts = _verdicts(pool, decided, kept, split)
        entries = (*parent.decisions, *parent.curated) if parent else ()
        files = SnapshotFiles(dataset, columns, {entry.path: entry for entry in entries}, warehouse, faces)
        not_empty = [shard for shard in verdicts if shard.published]
        return Draft(
            pool=pool.name,
            pool_shards=tuple(shard.name for shard in pool.shards),
            policy=policy.model_dump(mode="json"),
            signals={signal.signal: signal.fingerprint for signal in signals},
            pairs={pair.kind: pair.fingerprint for pair in pairs},
            decisions=tuple(in_order(files.write_decisions, verdicts, threads=READERS)),
            curated=tuple(in_order(files.write_curated, not_empty, threads=WRITERS)),
            published=files.write_published(published, pa.table([ids.filter(kept), split], schema=PUBLISHED)),
            counts={**record.counts, **split_counts(split)},
            funnel=record.result,
            blur_faces=blur_faces,
        )

    with warehouse.locked(f"publish-{dataset}", shared=True):  # expiry must not remove files that this one shares
        return commit(warehouse, dataset, build)


def _find_faces(signals: Sequence[SignalRef]) -> SignalRef:
    for signal in signals:
        if signal.signal == "faces":
            return signal
    raise EvidenceError("blur_faces needs the signal faces, which was not measured. Add faces to what is measured.")


def _read_decisions(pool: PoolRef, decisions: DecisionsRef, warehouse: Warehouse) -> list[pa.Table]:
    def read(shard: ShardRef) -> pa.Table:
        return warehouse.read_table(decisions.table(shard))

    return list(in_order(read, pool.shards, threads=READERS))


def _columns(tables: Iterable[pa.Table], name: str) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for table in tables for chunk in table[name].chunks], DECISIONS.field(name).type)


def _verdicts(
    pool: PoolRef, decided: Sequence[pa.Table], kept: pa.ChunkedArray, split: pa.StringArray
) -> list[Verdicts]:
    """What is published about each shard; `split` is that of all kept samples, null for those to leave out."""
    is_kept = np.asarray(kept)
    of_all = split.take(pa.array(np.cumsum(is_kept) - 1, mask=~is_kept))
    verdicts, begin = [], 0
    for shard, table in zip(pool.shards, decided, strict=True):
        own = of_all.slice(begin, len(table))
        begin += len(table)
        verdicts.append(Verdicts(shard, _without(table, pc.and_(table["kept"], pc.is_null(own))), own))
    return verdicts


def _without(decisions: pa.Table, left_out: pa.ChunkedArray) -> pa.Table:
    """The decisions with some kept samples rejected for their split."""
    if not pc.any(left_out).as_py():
        return decisions
    rows = [
        {**row, "kept": False, "failed": [SPLIT_CONFLICT]} if leaves else row
        for row, leaves in zip(decisions.to_pylist(), left_out.to_pylist(), strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=DECISIONS)


def split_counts(split: pa.StringArray) -> dict[str, int]:
    """Return how many samples each split has, and how many none, which are left out."""
    found = {count["values"]: count["counts"] for count in pc.value_counts(split).to_pylist()}
    return {**{name: found.get(name, 0) for name in SPLITS}, SPLIT_CONFLICT: found.get(None, 0)}
