"""Small frozen values that steps pass to each other instead of data.

A reference names objects in a warehouse; every one is hashable, picklable and cheap to log.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from storage.fingerprint import fingerprint

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a step returns: its reference, and whether the warehouse already held it."""

    ref: T
    cached: bool


@dataclass(frozen=True, order=True)
class ShardRef:
    """One immutable Parquet file of samples; `name` is the hash of its content."""

    pool: str
    name: str
    rows: int

    @property
    def path(self) -> str:
        """Where the shard's samples are, relative to the warehouse."""
        return f"pools/{self.pool}/{self.name}.parquet"


@dataclass(frozen=True)
class PoolRef:
    """A pool as it stood when the reference was made: its shards, ordered by name."""

    name: str
    shards: tuple[ShardRef, ...]

    @property
    def rows(self) -> int:
        """Samples in all shards together."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: the pool's name and its shards' hashes."""
        return fingerprint([self.name, [shard.name for shard in self.shards]])


@dataclass(frozen=True)
class SignalRef:
    """One signal's tables, one a shard, all measured the same way."""

    signal: str
    fingerprint: str

    @property
    def folder(self) -> str:
        """Where the signal's tables are, relative to the warehouse."""
        return f"signals/{self.signal}@{self.fingerprint}"

    def table(self, shard: ShardRef) -> str:
        """Path of the signal's table for one shard: its rows are that shard's, in the same order."""
        return f"{self.folder}/{shard.name}.parquet"


@dataclass(frozen=True)
class PairsRef:
    """Pair tables of one kind that together cover the shards they were asked for."""

    kind: str
    fingerprint: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class DecisionsRef:
    """Decision tables of one policy over one pool, one a shard."""

    fingerprint: str
    folder: str

    def table(self, shard: ShardRef) -> str:
        """Path of the decisions on one shard's samples, in the shard's order."""
        return f"{self.folder}/{shard.name}.parquet"

    @property
    def record(self) -> str:
        """Path of the record, written when all tables are there."""
        return f"{self.folder}/record.json"


@dataclass(frozen=True, order=True)
class DocumentShardRef:
    """One immutable Parquet file of interleaved documents; `name` is the hash of its content."""

    pool: str
    name: str
    rows: int

    @property
    def path(self) -> str:
        """Where the documents are, relative to the warehouse."""
        return f"documents/{self.pool}/{self.name}.parquet"


@dataclass(frozen=True)
class DocumentsRef:
    """A pool of documents as it stood when the reference was made, with their `images`, shards of the same names."""

    shards: tuple[DocumentShardRef, ...]
    images: PoolRef

    @property
    def rows(self) -> int:
        """Documents in all shards together."""
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: the pool's name and its shards' hashes."""
        return fingerprint([self.images.name, [shard.name for shard in self.shards]])


@dataclass(frozen=True)
class TextSignalRef:
    """One signal's tables on the texts of documents: a row a text segment, and one for each document's whole text."""

    signal: str
    fingerprint: str

    @property
    def folder(self) -> str:
        """Where the tables are, relative to the warehouse."""
        return f"text_signals/{self.signal}@{self.fingerprint}"

    def table(self, shard: DocumentShardRef) -> str:
        """Path of the table for one shard: document_id, position (null for the whole text), the signal's columns."""
        return f"{self.folder}/{shard.name}.parquet"


@dataclass(frozen=True)
class DocumentDecisionsRef:
    """Decisions of one policy over a pool's documents and their segments."""

    fingerprint: str
    folder: str

    def documents(self, shard: DocumentShardRef) -> str:
        """Path of the decisions on one shard's documents, in the shard's order."""
        return f"{self.folder}/documents/{shard.name}.parquet"

    def nodes(self, shard: DocumentShardRef) -> str:
        """Path of the decisions on one shard's segments, in the shard's order."""
        return f"{self.folder}/nodes/{shard.name}.parquet"

    @property
    def record(self) -> str:
        """Path of the record, written when all tables are there."""
        return f"{self.folder}/record.json"


@dataclass(frozen=True)
class SnapshotRef:
    """A published, numbered and immutable decision on a dataset."""

    dataset: str
    number: int

    @property
    def manifest(self) -> str:
        """Path of the manifest whose existence is the publication."""
        return f"snapshots/{self.dataset}/manifests/{self.number:08d}.json"

    @property
    def difference(self) -> str:
        """Path of the table of samples, or documents, added and removed since the snapshot before."""
        return f"snapshots/{self.dataset}/differences/{self.number:08d}.parquet"

    @property
    def report(self) -> str:
        """Path of the HTML report."""
        return f"snapshots/{self.dataset}/reports/{self.number:08d}.html"

    def __str__(self) -> str:
        return f"{self.dataset}@{self.number}"


@dataclass(frozen=True)
class RunRef:
    """One training: its record and adapter lie under `runs/<run_id>/`."""

    run_id: str

    @property
    def folder(self) -> str:
        """Where the run's files are, relative to the warehouse."""
        return f"runs/{self.run_id}"

    @property
    def adapter(self) -> str:
        """Folder of the PEFT adapter (adapter_config.json, adapter_model.safetensors)."""
        return f"{self.folder}/adapter"

    @property
    def event_files(self) -> str:
        """Folder of the training's metrics for TensorBoard."""
        return f"{self.folder}/tensorboard"

    @property
    def examples(self) -> str:
        """Parquet table of the samples or documents trained on; see `schema.EXAMPLES`."""
        return f"{self.folder}/examples.parquet"

    @property
    def table(self) -> str:
        """One-row Parquet table of the `runs` view, written last: it exists when the run finished."""
        return f"{self.folder}/run.parquet"


@dataclass(frozen=True)
class PreflightRef:
    """One preflight: what its checks found of a training before it started."""

    preflight_id: str

    @property
    def folder(self) -> str:
        """Where the preflight's files are, relative to the warehouse."""
        return f"preflights/{self.preflight_id}"

    @property
    def record(self) -> str:
        """Path of the record."""
        return f"{self.folder}/record.json"

    @property
    def modules(self) -> str:
        """Parquet table of the model's layers by part and kind: what is 4-bit, what is trained."""
        return f"{self.folder}/modules.parquet"

    @property
    def spans(self) -> str:
        """Parquet table of some samples as the model sees them, cut where the loss begins and ends."""
        return f"{self.folder}/spans.parquet"

    @property
    def table(self) -> str:
        """Parquet table of the `preflights` view, one row a finding, written last."""
        return f"{self.folder}/findings.parquet"


@dataclass(frozen=True)
class EvaluationRef:
    """One evaluation of a model on a split of a snapshot."""

    evaluation_id: str

    @property
    def table(self) -> str:
        """One-row Parquet table of the `evaluations` view, written last."""
        return f"evaluations/{self.evaluation_id}/evaluation.parquet"

    @property
    def answers(self) -> str:
        """Parquet table of every prompt, expected and generated answer."""
        return f"evaluations/{self.evaluation_id}/answers.parquet"


@dataclass(frozen=True)
class MergeRef:
    """One merge of an adapter into its base model."""

    merge_id: str

    @property
    def model(self) -> str:
        """Folder of the merged model (safetensors, config, processor)."""
        return f"merges/{self.merge_id}/model"

    @property
    def table(self) -> str:
        """One-row Parquet table of the `merges` view, written last."""
        return f"merges/{self.merge_id}/merge.parquet"
