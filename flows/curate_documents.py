"""Curate documents: sieve interleaved texts and images, place the images, publish interleaved shards.

What is done to the images of documents are the very steps of `curate`.
"""

from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows.curate import (
    CLUSTER_COLUMNS,
    check_pairs,
    cluster_pool,
    decide,
    evaluation_sets,
    link_report,
    pair_pool,
    report,
    score_pool,
    tell_of,
)
from flows.steps import Name, artifact_key, in_groups, step, task_runner, together
from storage.catalog import write_catalog
from storage.pool import read_documents
from storage.refs import (
    DecisionsRef,
    DocumentDecisionsRef,
    DocumentShardRef,
    DocumentsRef,
    Outcome,
    PairsRef,
    SignalRef,
    SnapshotRef,
    TextSignalRef,
)
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.decontaminate import beside
from tasks.curation.funnel import Funnel, funnel_markdown
from tasks.curation.interleaved import publish as publishing
from tasks.curation.interleaved.decide import decide_documents
from tasks.curation.interleaved.difference import document_difference, document_difference_markdown
from tasks.curation.interleaved.ingest import IngestedDocuments, ingest_document_file
from tasks.curation.interleaved.policy import DocumentPolicy, load_document_policy
from tasks.curation.interleaved.publish import Judged
from tasks.curation.interleaved.similarity import COLUMNS as SIMILARITY_COLUMNS
from tasks.curation.interleaved.similarity import measure_similarity, similarity_ref
from tasks.curation.interleaved.sources import find_document_files
from tasks.curation.interleaved.texts import is_text_signal, measure_texts, text_columns
from tasks.curation.policy import SEMANTIC, PolicyError
from tasks.curation.signals import Signal, SignalSettings, build_signals
from tasks.curation.signals.clip import Clip
from tasks.curation.sources.contract import SourceFile


@flow(name="curate-documents", task_runner=task_runner())
def curate_documents(
    dataset: Name,
    source: str | None = None,
    image_folder: str | None = None,
    pool: Name | None = None,
    policy: str = "deployments/policies/documents/obelics.yaml",
    policy_parameters: dict[str, float | str] | None = None,
    order: Literal["dom", "matched"] | None = None,
    signals: SignalSettings = SignalSettings(),
    warehouse: str = "warehouse",
) -> SnapshotRef:
    """Sieve interleaved documents and publish what passes as the dataset's next snapshot.

    Args:
        dataset: Name of the dataset to publish to.
        source: Where new documents are: JSONL as MMC4 has it, or JSONL or Parquet as OBELICS has it. Leave empty to
            decide again on what the pool holds.
        image_folder: Folder or tar with the images that documents only name; by default beside the documents.
        pool: Name of the pool to add them to; the dataset's name if empty.
        policy: Document policy file.
        policy_parameters: Values for the policy's parameters, in place of those in the file.
        order: Order of what is published, in place of the policy's: the source's (dom) or by similarity (matched).
        signals: What to measure of images and texts, and with which models.
        warehouse: Folder or URL of the warehouse.
    """
    store = Warehouse(warehouse)
    store.check_writable()
    rules = load_document_policy(policy).with_parameters(policy_parameters or {}).with_order(order)
    measures = build_signals(signals)
    texts = [signal for signal in measures if is_text_signal(signal)]
    of_images = [signal for signal in measures if not is_text_signal(signal)]
    clip = next((signal for signal in of_images if isinstance(signal, Clip)), None) if rules.needs_similarity else None
    check_document_policy(rules, of_images, texts, clip)

    documents = ingest_documents(source, image_folder=image_folder, pool=pool or dataset, warehouse=store)
    measure_all_texts(documents, texts, warehouse=store)
    evidence = score_pool(documents.images, of_images, warehouse=store)
    held_out = evaluation_sets(rules.image_policy, of_images, warehouse=store)
    compared = beside(documents.images, held_out)
    evidence += cluster_pool(compared, evidence, rules.image_policy.reach(), warehouse=store)
    pairs = pair_pool(compared, evidence, rules.image_policy.reach(), warehouse=store)
    evidence += compare_all(documents, clip, warehouse=store)
    images = decide.submit(documents.images, rules.image_policy, evidence, pairs, held_out, warehouse=store).result()
    decisions = judge.submit(documents, rules, images, evidence, texts, warehouse=store).result()
    judged = Judged(documents, rules, images, tuple(evidence), tuple(texts), decisions)
    snapshot = publish.submit(dataset, judged, pairs, warehouse=store).result()
    compare_with_parent.submit(snapshot, warehouse=store).result()
    page = report.submit(snapshot, warehouse=store).result()
    announce(snapshot, page, warehouse=store)
    return snapshot


# -- the steps ------------------------------------------------------------------------------------------------


@step(task_run_name="ingest documents {name}", retries=2, retry_delay_seconds=5)
def ingest(
    name: str, files: tuple[SourceFile, ...], *, pool: str, warehouse: Warehouse
) -> Outcome[list[IngestedDocuments]]:
    """Add the new documents of some source files to the pool."""
    return together(ingest_document_file(file, pool=pool, warehouse=warehouse) for file in files)


@step(task_run_name="measure texts {name}", retries=1)
def measure(
    name: str, shards: tuple[DocumentShardRef, ...], signals: list[Signal], *, warehouse: Warehouse
) -> Outcome[list[TextSignalRef]]:
    """Measure what the warehouse does not hold yet of the text signals for some shards."""
    found = together(outcome for shard in shards for outcome in measure_texts(shard, signals, warehouse=warehouse))
    return Outcome(found.ref[: len(signals)], found.cached)


@step(task_run_name="compare images and texts {name}", retries=1)
def compare(name: str, shards: tuple[DocumentShardRef, ...], clip: Clip, *, warehouse: Warehouse) -> Outcome[SignalRef]:
    """Compare the images of some shards' documents with their texts."""
    measured = together(measure_similarity(shard, clip, warehouse=warehouse) for shard in shards)
    return Outcome(similarity_ref(clip), measured.cached)


@step(task_run_name="decide texts and documents by {policy.name}")
def judge(
    documents: DocumentsRef,
    policy: DocumentPolicy,
    images: DecisionsRef,
    signals: list[SignalRef],
    texts: list[Signal],
    *,
    warehouse: Warehouse,
) -> Outcome[DocumentDecisionsRef]:
    """Keep or reject every segment and document, with all reasons, and place what stays."""
    return decide_documents(documents, policy, images, signals, texts, warehouse=warehouse)


@step(task_run_name="publish {dataset}")
def publish(dataset: str, judged: Judged, pairs: list[PairsRef], *, warehouse: Warehouse) -> Outcome[SnapshotRef]:
    """Publish the documents that were kept as the dataset's next snapshot."""
    outcome = publishing.publish_documents(dataset, judged, pairs, warehouse=warehouse)
    if not outcome.cached:
        tell_of(outcome.ref, warehouse=warehouse)
    return outcome


@step(task_run_name="compare {snapshot} with the one before")
def compare_with_parent(snapshot: SnapshotRef, *, warehouse: Warehouse) -> Outcome[str]:
    """Find which documents were added, removed or changed since the snapshot before, and why."""
    outcome = document_difference(snapshot, warehouse=warehouse)
    write_catalog(warehouse)
    return outcome


# -- before anything is measured ------------------------------------------------------------------------------


def check_document_policy(policy: DocumentPolicy, images: list[Signal], texts: list[Signal], clip: Clip | None) -> None:
    """Raise `PolicyError` if the policy does not fit the signals that will be measured."""
    if policy.needs_similarity and clip is None:
        raise PolicyError(f"{policy.origin} compares images with texts, which needs clip. Add it to the signals.")
    columns = [column for signal in images for column in signal.columns]
    columns += [*CLUSTER_COLUMNS] if SEMANTIC in policy.image_policy.reach() else []
    columns += [*SIMILARITY_COLUMNS] if clip else []
    policy.check(pa.schema(columns), text_columns(texts))
    check_pairs(policy.image_policy, images)


# -- many task runs of one step -------------------------------------------------------------------------------


def ingest_documents(source: str | None, *, image_folder: str | None, pool: str, warehouse: Warehouse) -> DocumentsRef:
    """Ingest a source file by file, in order, and return the pool's documents as they then are."""
    for files in in_groups(find_document_files(source, image_folder=image_folder) if source else []):
        ingest.submit(PurePosixPath(files[0].uri).name, files, pool=pool, warehouse=warehouse).result()
    documents = read_documents(warehouse, pool)
    if not documents.images.rows:
        held = f"{documents.rows} documents without any image" if documents.rows else "no documents"
        raise ValueError(f"{warehouse.root}: pool {pool!r} holds {held}. Give a source of texts and images to ingest.")
    get_run_logger().info("Pool %s: %d documents, %d images", pool, documents.rows, documents.images.rows)
    return documents


def measure_all_texts(documents: DocumentsRef, signals: list[Signal], *, warehouse: Warehouse) -> None:
    """Measure the texts of all documents."""
    groups = in_groups(documents.shards)
    futures = [measure.submit(f"{group[0].name[:4]}…", group, signals, warehouse=warehouse) for group in groups]
    for future in futures:
        future.result()


def compare_all(documents: DocumentsRef, clip: Clip | None, *, warehouse: Warehouse) -> list[SignalRef]:
    """Compare images and texts of all documents, if the policy asks for it."""
    if clip is None:
        return []
    groups = in_groups(documents.shards)
    futures = [compare.submit(f"{group[0].name[:4]}…", group, clip, warehouse=warehouse) for group in groups]
    for future in futures:
        future.result()
    return [similarity_ref(clip)]


def announce(snapshot: SnapshotRef, page: str, *, warehouse: Warehouse) -> None:
    """Publish the funnels of documents, texts and images, what changed and a link to the report as artifacts."""
    funnels = read_manifest(warehouse, snapshot).funnel
    of_documents = Funnel.from_dict(funnels["documents"])
    get_run_logger().info("%s: kept %d of %d documents", snapshot, of_documents.kept, of_documents.samples)
    tables = [funnel_markdown(Funnel.from_dict(funnels[what]), what) for what in ("documents", "texts", "images")]
    create_markdown_artifact(
        key=artifact_key("funnel", snapshot.dataset),
        markdown="\n".join(tables),
        description=f"Funnel of {snapshot}",
    )
    create_markdown_artifact(
        key=artifact_key("difference", snapshot.dataset),
        markdown=document_difference_markdown(snapshot, warehouse=warehouse),
        description=f"What {snapshot} changed",
    )
    link_report(snapshot, page, warehouse=warehouse)
