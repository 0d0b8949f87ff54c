"""Snapshots: numbered manifests, each created exclusively, that say which shards are published.

What no manifest names does not exist. The highest number is the latest; a number, once there, never changes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from storage.fingerprint import fingerprint
from storage.refs import Outcome, SnapshotRef
from storage.warehouse import Warehouse, WarehouseError, check_name


@dataclass(frozen=True)
class FileEntry:
    """One Parquet file of a snapshot, and the pool shard its samples come from."""

    path: str
    rows: int
    bytes: int
    sha256: str
    pool_shard: str


@dataclass(frozen=True, kw_only=True)
class Draft:
    """All that a snapshot says, before it has a number.

    `policy` is the whole policy, `signals` maps a signal's name to its fingerprint, `pairs` a kind to its own,
    `published` is the table of every sample that this or an earlier snapshot of the dataset published, `funnel` holds
    what each condition and rule took away, `counts` the same and the splits by flat names.
    `blur_faces` says that faces are blurred in the published images. A snapshot of interleaved documents has the last
    three in place of `decisions` and `curated`, and `published` names documents.
    """

    pool: str
    pool_shards: tuple[str, ...]
    policy: Mapping[str, Any]
    signals: Mapping[str, str]
    pairs: Mapping[str, str]
    decisions: tuple[FileEntry, ...]
    curated: tuple[FileEntry, ...]
    published: FileEntry | None
    counts: Mapping[str, int]
    funnel: Mapping[str, Any] = field(default_factory=dict)
    blur_faces: bool = False
    documents: tuple[FileEntry, ...] = ()
    document_decisions: tuple[FileEntry, ...] = ()
    node_decisions: tuple[FileEntry, ...] = ()

    @property
    def content(self) -> str:
        """Identity of the snapshot: equal drafts publish the same samples for the same reasons."""
        return fingerprint(self)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """All files that the snapshot is made of."""
        documents = (*self.documents, *self.document_decisions, *self.node_decisions)
        return (*self.curated, *self.decisions, *documents, *([self.published] if self.published else []))

    @property
    def samples_content(self) -> str:
        """Identity of the published rows alone, whatever was rejected and why: what training depends on."""
        return fingerprint([entry.sha256 for entry in (*self.curated, *self.documents)])


@dataclass(frozen=True, kw_only=True)
class Manifest(Draft):
    """A published snapshot."""

    dataset: str
    number: int
    parent: int | None
    created_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    code_version: str = field(default_factory=lambda: version("tamis"))

    @property
    def ref(self) -> SnapshotRef:
        """The reference that later steps carry."""
        return SnapshotRef(self.dataset, self.number)

    @property
    def content(self) -> str:
        """Identity of what is published, whatever its number or time."""
        return Draft(**{name: getattr(self, name) for name in Draft.__dataclass_fields__}).content


def commit(warehouse: Warehouse, dataset: str, build: Callable[[Manifest | None], Draft]) -> Outcome[SnapshotRef]:
    """Publish what `build` makes of the latest snapshot, as the next number.

    `build` gets the latest manifest (None for the first) and is called again when another writer took the number
    meanwhile, so it must only write content-named files. If its draft equals the latest snapshot, that one is
    returned as cached and nothing is published.
    """
    check_name(dataset, "dataset")
    while True:
        parent = latest(warehouse, dataset)
        draft = build(parent)
        if parent is not None and parent.content == draft.content:
            return Outcome(parent.ref, cached=True)
        manifest = Manifest(
            **{name: getattr(draft, name) for name in Draft.__dataclass_fields__},
            dataset=dataset,
            number=parent.number + 1 if parent else 1,
            parent=parent.number if parent else None,
        )
        if warehouse.create_bytes(manifest.ref.manifest, _dump(manifest)):
            return Outcome(manifest.ref, cached=False)


def latest(warehouse: Warehouse, dataset: str) -> Manifest | None:
    """Return the manifest with the highest number, or None if nothing is published."""
    found = numbers(warehouse, dataset)
    return read_manifest(warehouse, SnapshotRef(dataset, found[-1])) if found else None


def numbers(warehouse: Warehouse, dataset: str) -> list[int]:
    """Return the numbers of a dataset's snapshots, ascending."""
    check_name(dataset, "dataset")
    return [int(name.removesuffix(".json")) for name in warehouse.names(f"snapshots/{dataset}/manifests")]


def datasets(warehouse: Warehouse) -> list[str]:
    """Return the names of all datasets with at least one snapshot, sorted."""
    return [name for name in warehouse.names("snapshots") if numbers(warehouse, name)]


def read_manifest(warehouse: Warehouse, snapshot: SnapshotRef) -> Manifest:
    """Return a snapshot's manifest. Raises `WarehouseError` naming the snapshots that exist if it is not there."""
    try:
        data = json.loads(warehouse.read_bytes(snapshot.manifest))
    except FileNotFoundError:
        known = ", ".join(map(str, numbers(warehouse, snapshot.dataset))) or "none"
        raise WarehouseError(
            f"{warehouse.root}: dataset {snapshot.dataset!r} has no snapshot {snapshot.number} (there are: {known})."
            " Publish it with the curate flow, or name one that exists."
        ) from None
    for name in ("decisions", "curated", "documents", "document_decisions", "node_decisions"):
        data[name] = tuple(FileEntry(**entry) for entry in data.get(name, ()))
    data["published"] = FileEntry(**data["published"]) if data["published"] else None
    data["pool_shards"] = tuple(data["pool_shards"])
    return Manifest(**data)


def find_snapshot(warehouse: Warehouse, dataset: str, number: int | None = None) -> SnapshotRef:
    """Return a snapshot by number, or the latest. Raises `WarehouseError` if there is none."""
    if number is None:
        newest = latest(warehouse, dataset)
        if newest is None:
            known = ", ".join(datasets(warehouse)) or "none"
            raise WarehouseError(
                f"{warehouse.root}: dataset {dataset!r} has no snapshot (datasets: {known}). Run the curate flow first."
            )
        return newest.ref
    return read_manifest(warehouse, SnapshotRef(dataset, number)).ref


def _dump(manifest: Manifest) -> bytes:
    return json.dumps(asdict(manifest), indent=1, sort_keys=True).encode()
