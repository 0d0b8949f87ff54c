"""Everything between a source of documents and a snapshot, as the flow does it, for tests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

import tasks
from storage.record import Record, write_record
from storage.refs import DocumentsRef, SignalRef, SnapshotRef
from storage.schema import SAMPLE_ID
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.interleaved.decide import decide_documents
from tasks.curation.interleaved.policy import DocumentPolicy, load_document_policy
from tasks.curation.interleaved.publish import Judged, publish_documents
from tasks.curation.interleaved.similarity import measure_similarity, similarity_ref
from tasks.curation.interleaved.texts import is_text_signal, measure_texts
from tasks.curation.score import score_shard
from tasks.curation.signals import SignalSettings, build_signals
from tasks.curation.signals.clip import Clip

ROOT = Path(tasks.__file__).parent
CLIP = f"local-dir:{ROOT / 'sample_models' / 'clip'}"
POLICIES = ROOT.parent / "deployments" / "policies" / "documents"

Row = dict[str, Any]


def shipped(name: str, **parameters: float) -> DocumentPolicy:
    return load_document_policy(POLICIES / f"{name}.yaml").with_parameters(parameters)


def judge(
    warehouse: Warehouse,
    documents: DocumentsRef,
    policy: DocumentPolicy,
    *,
    measure: Sequence[str],
    known: Mapping[str, float] | None = None,
    **settings: str,
) -> Judged:
    """Measure and decide; `known` are NSFW scores by sample, 0.01 for others, if given at all."""
    signals = build_signals(SignalSettings.model_validate({"measure": tuple(measure), "clip_model": CLIP, **settings}))
    texts = [signal for signal in signals if is_text_signal(signal)]
    images = [signal for signal in signals if not is_text_signal(signal)]
    refs = [signal.ref for signal in images]
    for shard in documents.images.shards:
        score_shard(shard, images, warehouse=warehouse, threads=1)
    for shard in documents.shards:
        measure_texts(shard, texts, warehouse=warehouse)
    for clip in (signal for signal in images if isinstance(signal, Clip)):
        for shard in documents.shards:
            measure_similarity(shard, clip, warehouse=warehouse)
        refs.append(similarity_ref(clip))
    if known is not None:
        refs.append(write_nsfw(warehouse, documents, known))
    decided = decide(documents.images, policy.image_policy, refs, [], warehouse=warehouse).ref
    ref = decide_documents(documents, policy, decided, refs, texts, warehouse=warehouse).ref
    return Judged(documents, policy, decided, tuple(refs), tuple(texts), ref)


def publish(warehouse: Warehouse, judged: Judged, dataset: str = "set") -> SnapshotRef:
    return publish_documents(dataset, judged, [], warehouse=warehouse).ref


def write_nsfw(warehouse: Warehouse, documents: DocumentsRef, known: Mapping[str, float]) -> SignalRef:
    """A signal's tables written by hand."""
    ref = SignalRef("nsfw", "1")
    schema = pa.schema([SAMPLE_ID, pa.field("nsfw_score", pa.float32())])
    for shard in documents.images.shards:
        ids = warehouse.read_table(shard.path, ["sample_id"])["sample_id"].to_pylist()
        warehouse.write_table(ref.table(shard), pa.table([ids, [known.get(name, 0.01) for name in ids]], schema))
    write_record(warehouse, f"{ref.folder}/signal.json", Record("signal", "1", {}, {}))
    return ref


@dataclass(frozen=True)
class Tables:
    """What is stored of documents and decisions, by key of the document."""

    documents: dict[str, Row]
    decisions: dict[str, Row]
    nodes: dict[str, list[Row]]

    @classmethod
    def read(cls, warehouse: Warehouse, judged: Judged) -> "Tables":
        shards = judged.documents.shards
        documents = {row["key"]: row for shard in shards for row in warehouse.read_table(shard.path).to_pylist()}
        key_of = {row["document_id"]: key for key, row in documents.items()}
        decided = [row for s in shards for row in warehouse.read_table(judged.decisions.documents(s)).to_pylist()]
        nodes: dict[str, list[Row]] = {key: [] for key in documents}
        for shard in shards:
            for row in warehouse.read_table(judged.decisions.nodes(shard)).to_pylist():
                nodes[key_of[row["document_id"]]].append(row)
        return cls(documents, {row["key"]: row for row in decided}, nodes)


def published(warehouse: Warehouse, snapshot: SnapshotRef) -> dict[str, Row]:
    """The published documents by key."""
    entries = read_manifest(warehouse, snapshot).documents
    return {row["key"]: row for entry in entries for row in warehouse.read_table(entry.path).to_pylist()}
