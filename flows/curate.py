"""Curate: measure a pool, find its duplicates, decide by a policy, publish a snapshot.

`python -m flows.curate` is not needed: call `curate(...)`, or deploy it with `deployments/prefect.yaml`.
"""

from collections.abc import Collection, Mapping
from math import ceil
from pathlib import PurePosixPath

import pyarrow as pa
from prefect import flow, get_run_logger
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.events import emit_event

from flows.steps import Name, artifact_key, grouped, in_groups, step, task_runner, together
from storage.catalog import write_catalog
from storage.pool import read_pool
from storage.refs import DecisionsRef, Outcome, PairsRef, PoolRef, ShardRef, SignalRef, SnapshotRef
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation import decide as deciding
from tasks.curation import publish as publishing
from tasks.curation.decontaminate import beside
from tasks.curation.difference import difference, difference_markdown
from tasks.curation.funnel import Funnel, funnel_markdown
from tasks.curation.ingest import IngestedFile, ingest_file
from tasks.curation.pairs.clusters import COLUMNS as CLUSTER_COLUMNS
from tasks.curation.pairs.clusters import cluster_embeddings
from tasks.curation.pairs.exact import find_exact_pairs
from tasks.curation.pairs.perceptual import find_perceptual_pairs
from tasks.curation.pairs.semantic import find_semantic_pairs
from tasks.curation.policy import SEMANTIC, Policy, PolicyError, load_policy
from tasks.curation.quarantine import quarantine_reasons
from tasks.curation.report import write_report
from tasks.curation.score import score_shard
from tasks.curation.signals import Signal, SignalSettings, build_signals
from tasks.curation.sources.contract import SourceError, SourceFile
from tasks.curation.sources.settings import SourceSettings

PAIR_DISTANCE = {"perceptual": 4, SEMANTIC: 0.1}
"""How far pairs are looked for at least, bits or 1 - cosine, so that a policy can choose among them."""

MEASURED_BY = {"bytes": "exact", "pixels": "exact", "perceptual": "perceptual", SEMANTIC: "clip"}
"""The signal in which pairs of a kind are looked for."""


@flow(name="curate", task_runner=task_runner())
def curate(
    dataset: Name,
    source: str | None = None,
    pool: Name | None = None,
    policy: str = "deployments/policies/default.yaml",
    policy_parameters: dict[str, float | str] | None = None,
    signals: SignalSettings = SignalSettings(),
    warehouse: str = "warehouse",
    blur_faces: bool = False,
    source_settings: SourceSettings = SourceSettings(),
) -> SnapshotRef:
    """Sieve a pool of image-caption pairs and publish what passes as the dataset's next snapshot.

    Args:
        dataset: Name of the dataset to publish to.
        source: Where new samples are: a folder, file, glob or URL of WebDataset tars, Parquet, JSONL, or a Hugging
            Face dataset. Leave empty to decide again on what the pool holds.
        pool: Name of the pool to add them to; the dataset's name if empty.
        policy: Policy file.
        policy_parameters: Values for the policy's parameters, in place of those in the file.
        signals: What to measure and with which models.
        warehouse: Folder or URL of the warehouse.
        blur_faces: Publish images with the faces in them blurred; `faces` must be among the signals to measure.
        source_settings: How the source is read, if that can't be told from it.
    """
    store = Warehouse(warehouse)
    store.check_writable()
    rules = load_policy(policy).with_parameters(policy_parameters or {})
    measures = build_signals(signals)
    if blur_faces and "faces" not in signals.measure:
        raise ValueError("blur_faces needs to know where faces are. Add faces to the signals to measure.")
    check_policy(rules, measures)

    samples = ingest_source(source, pool=pool or dataset, warehouse=store, settings=source_settings)
    evidence = score_pool(samples, measures, warehouse=store)
    held_out = evaluation_sets(rules, measures, warehouse=store)
    compared = beside(samples, held_out)
    evidence += cluster_pool(compared, evidence, rules.reach(), warehouse=store)
    pairs = pair_pool(compared, evidence, rules.reach(), warehouse=store)
    decisions = decide.submit(samples, rules, evidence, pairs, held_out, warehouse=store).result()
    snapshot = publish.submit(
        dataset, samples, decisions, rules, evidence, pairs, held_out, warehouse=store, blur_faces=blur_faces
    ).result()
    compare.submit(snapshot, warehouse=store).result()
    page = report.submit(snapshot, warehouse=store).result()
    announce(snapshot, page, warehouse=store)
    return snapshot


# -- the steps ------------------------------------------------------------------------------------------------


@step(task_run_name="ingest {name}", retries=2, retry_delay_seconds=5)
def ingest(name: str, files: tuple[SourceFile, ...], *, pool: str, warehouse: Warehouse) -> Outcome[list[IngestedFile]]:
    """Add the new samples of some source files to the pool."""
    outcome = together(ingest_file(file, pool=pool, warehouse=warehouse) for file in files)
    for file in outcome.ref:
        get_run_logger().info("%s", file)
    return outcome


@step(task_run_name="score {name}", retries=1)
def score(
    name: str, shards: tuple[ShardRef, ...], signals: list[Signal], *, warehouse: Warehouse
) -> Outcome[list[SignalRef]]:
    """Measure what the warehouse does not hold yet of the signals for some shards."""
    found = together(outcome for shard in shards for outcome in score_shard(shard, signals, warehouse=warehouse))
    return Outcome(found.ref[: len(signals)], found.cached)


@step(task_run_name="cluster {pool.name}")
def cluster(pool: PoolRef, signal: SignalRef, *, warehouse: Warehouse) -> Outcome[SignalRef]:
    """Find the clusters that semantic pairs are looked for in."""
    return cluster_embeddings(pool, signal, warehouse=warehouse)


@step(task_run_name="pair {pool.name} by {kind}")
def pair(
    kind: str, pool: PoolRef, signals: dict[str, SignalRef], *, max_distance: float, warehouse: Warehouse
) -> Outcome[PairsRef]:
    """Find duplicate pairs of one kind among the pool's samples."""
    signal = signals[MEASURED_BY[kind]]
    if kind == SEMANTIC:
        return find_semantic_pairs(
            pool, signal, signals["semantic_clusters"], max_distance=max_distance, warehouse=warehouse
        )
    if kind == "perceptual":
        return find_perceptual_pairs(pool, signal, max_distance=ceil(max_distance), warehouse=warehouse)
    return find_exact_pairs(
        pool, signal, column="bytes_hash" if kind == "bytes" else "pixels_hash", warehouse=warehouse
    )


@step(task_run_name="decide {pool.name} by {policy.name}")
def decide(
    pool: PoolRef,
    policy: Policy,
    signals: list[SignalRef],
    pairs: list[PairsRef],
    held_out: list[PoolRef],
    *,
    warehouse: Warehouse,
) -> Outcome[DecisionsRef]:
    """Keep or reject every sample, with all reasons."""
    return deciding.decide(pool, policy, signals, pairs, evaluation_pools=held_out, warehouse=warehouse)


@step(task_run_name="publish {dataset}")
def publish(
    dataset: str,
    pool: PoolRef,
    decisions: DecisionsRef,
    policy: Policy,
    signals: list[SignalRef],
    pairs: list[PairsRef],
    held_out: list[PoolRef],
    *,
    warehouse: Warehouse,
    blur_faces: bool,
) -> Outcome[SnapshotRef]:
    """Publish what was kept as the dataset's next snapshot."""
    outcome = publishing.publish(
        dataset,
        pool,
        decisions,
        policy,
        signals,
        pairs,
        evaluation_pools=held_out,
        warehouse=warehouse,
        blur_faces=blur_faces,
    )
    if not outcome.cached:
        tell_of(outcome.ref, warehouse=warehouse)
    return outcome


@step(task_run_name="compare {snapshot} with the one before")
def compare(snapshot: SnapshotRef, *, warehouse: Warehouse) -> Outcome[str]:
    """Find what was added and removed since the snapshot before, and why."""
    outcome = difference(snapshot, warehouse=warehouse)
    write_catalog(warehouse)
    return outcome


@step(task_run_name="report on {snapshot}")
def report(snapshot: SnapshotRef, *, warehouse: Warehouse) -> Outcome[str]:
    """Write the snapshot's report, one HTML file."""
    return write_report(snapshot, warehouse=warehouse)


# -- before anything is measured ------------------------------------------------------------------------------


def check_policy(policy: Policy, signals: list[Signal]) -> None:
    """Raise `PolicyError` if the policy does not fit the signals that will be measured."""
    columns = [column for signal in signals for column in signal.columns]
    kinds = policy.reach()
    policy.check(pa.schema([*columns, *CLUSTER_COLUMNS] if SEMANTIC in kinds else columns))
    check_pairs(policy, signals)


def check_pairs(policy: Policy, signals: list[Signal]) -> None:
    """Raise `PolicyError` if the policy's duplicate rules need a signal that will not be measured."""
    for kind in policy.reach():
        if kind not in MEASURED_BY:
            raise PolicyError(f"{policy.origin}: there are no pairs of kind {kind!r}. Kinds: {', '.join(MEASURED_BY)}.")
        if MEASURED_BY[kind] not in {signal.name for signal in signals}:
            raise PolicyError(
                f"{policy.origin}: pairs of kind {kind} need the signal {MEASURED_BY[kind]}, which is not measured. "
                "Add it to the signals, or remove the duplicate rule."
            )


# -- many task runs of one step -------------------------------------------------------------------------------


def ingest_source(
    source: str | None, *, pool: str, warehouse: Warehouse, settings: SourceSettings = SourceSettings()
) -> PoolRef:
    """Ingest a source file by file, in order, and return the pool as it then is."""
    for files in in_groups(settings.find(source) if source else []):
        ingest.submit(PurePosixPath(files[0].uri).name, files, pool=pool, warehouse=warehouse).result()
    samples = read_pool(warehouse, pool)
    if not samples.shards:
        raise SourceError(f"{warehouse.root}: pool {pool!r} is empty. {_why_empty(source, pool, warehouse)}")
    get_run_logger().info("Pool %s: %d samples in %d shards", pool, samples.rows, len(samples.shards))
    return samples


def _why_empty(source: str | None, pool: str, warehouse: Warehouse) -> str:
    if not source:
        return "Give a source to ingest."
    reasons = quarantine_reasons(warehouse, pool)
    if not reasons:
        return f"{source} has no rows."
    write_catalog(warehouse)
    return f"No row of {source} can be used: {reasons}. The catalog's view quarantine says more of each."


def score_pool(pool: PoolRef, signals: list[Signal], *, warehouse: Warehouse) -> list[SignalRef]:
    """Score a pool in groups of shards, showing progress."""
    groups = grouped(pool.shards)
    progress = create_progress_artifact(
        progress=0.0, key=artifact_key("scoring", pool.name), description=f"Scoring {pool.name}"
    )
    futures = [
        score.submit(f"{pool.name}/{group[0].name[:4]}…", group, signals, warehouse=warehouse) for group in groups
    ]
    for done, future in enumerate(futures, start=1):
        evidence: list[SignalRef] = future.result()
        update_progress_artifact(progress, progress=100 * done / len(groups))
    return evidence


def evaluation_sets(policy: Policy, signals: list[Signal], *, warehouse: Warehouse) -> list[PoolRef]:
    """Read and score the pools that the policy decontaminates against."""
    pools = [read_pool(warehouse, name) for name in policy.evaluation_pools]
    for pool in pools:
        if not pool.shards:
            raise PolicyError(f"{policy.origin}: pool {pool.name} is empty. Ingest the evaluation set into it first.")
        score_pool(pool, signals, warehouse=warehouse)
    return pools


def cluster_pool(
    pool: PoolRef, signals: list[SignalRef], kinds: Collection[str], *, warehouse: Warehouse
) -> list[SignalRef]:
    """Cluster the pool's embeddings, if semantic pairs are among the kinds to look for."""
    if SEMANTIC not in kinds:
        return []
    (clip,) = (signal for signal in signals if signal.signal == MEASURED_BY[SEMANTIC])
    return [cluster.submit(pool, clip, warehouse=warehouse).result()]


def pair_pool(
    pool: PoolRef, signals: list[SignalRef], reach: Mapping[str, float], *, warehouse: Warehouse
) -> list[PairsRef]:
    """Find pairs of each kind as far as `reach` says, and at least as far as `PAIR_DISTANCE`."""
    by_name = {signal.signal: signal for signal in signals}
    futures = [
        pair.submit(kind, pool, by_name, max_distance=max(PAIR_DISTANCE.get(kind, 0), wanted), warehouse=warehouse)
        for kind, wanted in reach.items()
    ]
    return [future.result() for future in futures]


def tell_of(snapshot: SnapshotRef, *, warehouse: Warehouse) -> None:
    """Show a new snapshot in the catalog, and emit the event that deployments wait for."""
    write_catalog(warehouse)
    emit_event(
        "tamis.snapshot.published",
        resource={"prefect.resource.id": f"tamis.dataset.{snapshot.dataset}"},
        payload={"dataset": snapshot.dataset, "snapshot": snapshot.number, "warehouse": warehouse.root},
    )


def announce(snapshot: SnapshotRef, page: str, *, warehouse: Warehouse) -> None:
    """Publish the funnel, what changed and a link to the report as artifacts."""
    manifest = read_manifest(warehouse, snapshot)
    funnel = Funnel.from_dict(manifest.funnel)
    create_markdown_artifact(
        key=artifact_key("funnel", snapshot.dataset),
        markdown=funnel_markdown(funnel) + quarantine_markdown(warehouse, manifest.pool),
        description=f"Funnel of {snapshot}",
    )
    create_markdown_artifact(
        key=artifact_key("difference", snapshot.dataset),
        markdown=difference_markdown(snapshot, warehouse=warehouse),
        description=f"What {snapshot} changed",
    )
    get_run_logger().info("%s: kept %d of %d samples", snapshot, funnel.kept, funnel.samples)
    link_report(snapshot, page, warehouse=warehouse)


def link_report(snapshot: SnapshotRef, page: str, *, warehouse: Warehouse) -> None:
    """Publish a link to a snapshot's report as an artifact."""
    location = warehouse.uri(page)
    get_run_logger().info("Report on %s: %s", snapshot, location)
    create_link_artifact(
        key=artifact_key("report", snapshot.dataset),
        link=f"file://{location}" if warehouse.is_local else location,
        link_text=f"Report on {snapshot}: {location}",
        description=f"Report on {snapshot}",
    )


def quarantine_markdown(warehouse: Warehouse, pool: str) -> str:
    """Say which rows of the pool's sources never became samples; nothing if all did."""
    reasons = quarantine_reasons(warehouse, pool)
    return f"\nIn quarantine, because they can't be read: {reasons}.\n" if reasons else ""
