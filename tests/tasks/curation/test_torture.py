"""The steps of a curation, one after the other, on a source in which nearly every row is hostile or odd."""

import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from storage import schema
from storage.catalog import connect, write_catalog
from storage.pool import read_pool
from storage.refs import Outcome, PoolRef, SnapshotRef
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.difference import difference, difference_markdown
from tasks.curation.funnel import Funnel
from tasks.curation.ingest import IngestedFile, find_source_files, ingest_file
from tasks.curation.pairs.exact import find_exact_pairs
from tasks.curation.pairs.perceptual import find_perceptual_pairs
from tasks.curation.policy import Policy
from tasks.curation.publish import publish
from tasks.curation.report import write_report
from tasks.curation.score import score_shard
from tasks.curation.signals import SignalSettings, build_signals
from tests.tasks.curation.hostile import CAPTIONS, INJECTION, MARKUP, SAMPLE, Row, valid_text, write_hostile
from tests.tasks.curation.report.page import Page

SETTINGS = SignalSettings(
    measure=("size", "caption", "characters", "words", "language", "exact", "perceptual", "sharpness")
)
POLICY = Policy.model_validate(
    {
        "name": "torture",
        "conditions": {
            "words": "caption_words between 2 and 200",
            "side": "least(width, height) >= 32",
            "aspect": "aspect <= 20",
            "decoded": "phash is not null",
            "still": "frames = 1",
        },
        "duplicates": {"exact": ["bytes", "pixels"], "near": {"pairs": ["perceptual"], "max_distance": 4}},
        "prefer": ["width * height desc", "file_bytes desc"],
    }
)
Key = tuple[str, str]
"""A row's source file and key."""


@dataclass(frozen=True)
class Curated:
    """A finished curation: what went in, and every outcome."""

    root: Path
    rows: list[Row]
    warehouse: Warehouse
    before: dict[str, str]
    ingested: dict[str, IngestedFile]
    pool: PoolRef
    snapshot: SnapshotRef
    cached: list[bool]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The pool's samples, without their images."""
        columns = ["sample_id", "key", "caption", "source"]
        paths = [shard.path for shard in self.pool.shards]
        return list(self.warehouse.read_tables(paths, schema.SAMPLES, columns).to_pylist())

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        paths = [f"quarantine/p/{name}" for name in self.warehouse.names("quarantine/p")]
        return list(self.warehouse.read_tables(paths, schema.QUARANTINE).to_pylist())

    @property
    def decisions(self) -> dict[str, dict[str, Any]]:
        entries = read_manifest(self.warehouse, self.snapshot).decisions
        table = self.warehouse.read_tables([entry.path for entry in entries], schema.DECISIONS)
        return {row["sample_id"]: row for row in table.to_pylist()}

    def report(self) -> str:
        return self.warehouse.read_bytes(self.snapshot.report).decode()


def curate(source: Path, warehouse: Warehouse) -> tuple[dict[str, IngestedFile], PoolRef, SnapshotRef, list[bool]]:
    """All steps as a flow runs them, on one thread."""
    outcomes: list[Outcome[Any]] = []

    def done(outcome: Outcome[Any]) -> Any:
        outcomes.append(outcome)
        return outcome.ref

    ingested = {
        valid_text(f.name): done(ingest_file(f, pool="p", warehouse=warehouse)) for f in find_source_files(str(source))
    }
    pool = read_pool(warehouse, "p")
    signals = build_signals(SETTINGS)
    for shard in pool.shards:
        outcomes += score_shard(shard, signals, warehouse=warehouse, threads=1)
    refs = {signal.name: signal.ref for signal in signals}
    pairs = [
        done(find_exact_pairs(pool, refs["exact"], column="bytes_hash", warehouse=warehouse)),
        done(find_exact_pairs(pool, refs["exact"], column="pixels_hash", warehouse=warehouse)),
        done(find_perceptual_pairs(pool, refs["perceptual"], max_distance=4, warehouse=warehouse)),
    ]
    evidence = list(refs.values())
    decisions = done(decide(pool, POLICY, evidence, pairs, warehouse=warehouse))
    snapshot = done(publish("p", pool, decisions, POLICY, evidence, pairs, warehouse=warehouse))
    done(difference(snapshot, warehouse=warehouse))
    done(write_report(snapshot, warehouse=warehouse))
    return ingested, pool, snapshot, [outcome.cached for outcome in outcomes]


def everything_below(root: Path) -> dict[str, str]:
    """What there is in a folder beside the warehouse: by path, a hash of each file's bytes."""
    found = {}
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if Path(folder, name) != root / "warehouse"]
        for name in [*names, *files]:
            path = Path(folder, name)
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
    return found


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Curated:
    root = tmp_path_factory.mktemp("torture")
    rows = write_hostile(root / "source", outside=root / "outside")
    (root / "cwd").mkdir()
    before = everything_below(root)
    warehouse = Warehouse(str(root / "warehouse"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "cwd")
        ingested, pool, snapshot, cached = curate(root / "source", warehouse)
    return Curated(root, rows, warehouse, before, ingested, pool, snapshot, cached)


def by_key(rows: list[dict[str, Any]], fates: list[str]) -> dict[Key, Counter[str]]:
    found: dict[Key, Counter[str]] = defaultdict(Counter)
    for row, fate in zip(rows, fates, strict=True):
        found[row["source"]["path"].rsplit("/", 1)[-1], row["key"] or ""][fate] += 1
    return found


def test_every_row_is_a_sample_or_lies_in_quarantine_with_its_reason(curated: Curated) -> None:
    in_pool = by_key(curated.samples, [SAMPLE] * len(curated.samples))
    at_fault = by_key(curated.quarantine, [row["reason"] for row in curated.quarantine])
    wrong = {
        (row.file, row.key): (set(row.fates), in_pool[row.file, row.key] + at_fault[row.file, row.key])
        for row in curated.rows
        if not row.fates & (in_pool[row.file, row.key] + at_fault[row.file, row.key]).keys()
    }
    assert not wrong
    assert {*in_pool, *at_fault} == {(row.file, row.key) for row in curated.rows}


def test_the_counts_of_every_file_add_up_to_its_rows(curated: Curated) -> None:
    rows = Counter(row.file for row in curated.rows)
    counted = {name: file.samples + file.known + file.quarantined for name, file in curated.ingested.items()}
    assert counted == {name: rows[name] for name in curated.ingested}
    assert sum(file.samples for file in curated.ingested.values()) == curated.pool.rows
    assert sum(file.known for file in curated.ingested.values()) == 1  # one row of the source is there twice


def test_every_sample_is_kept_or_says_why_not(curated: Curated) -> None:
    decisions = curated.decisions
    assert decisions.keys() == {sample["sample_id"] for sample in curated.samples}
    kept = {identifier for identifier, decision in decisions.items() if decision["kept"]}
    for identifier, decision in decisions.items():
        assert decision["kept"] == (not decision["failed"] and decision["duplicate_of"] is None), identifier
        assert decision["duplicate_of"] is None or decision["duplicate_of"] in kept, identifier
    assert len(kept) > 10
    manifest = read_manifest(curated.warehouse, curated.snapshot)
    published = curated.warehouse.read_tables([e.path for e in manifest.curated], schema.CURATED, ["sample_id"])
    assert sorted(published["sample_id"].to_pylist()) == sorted(kept)
    funnel = Funnel.from_dict(manifest.funnel)
    assert (funnel.samples, funnel.kept) == (len(decisions), len(kept))
    taken = sum(stage.fails for stage in funnel.duplicates)
    assert funnel.samples - funnel.kept == sum(1 for d in decisions.values() if d["failed"]) + taken


def test_an_image_that_only_fails_in_decoding_is_rejected_and_in_quarantine(curated: Curated) -> None:
    hollow = {(row.file, row.key) for row in curated.rows if not row.decodes}
    names = {s["sample_id"]: (s["source"]["path"].rsplit("/", 1)[-1], s["key"]) for s in curated.samples}
    assert {names[i] for i, decision in curated.decisions.items() if "decoded" in decision["failed"]} == hollow
    at_fault = by_key(curated.quarantine, [row["reason"] for row in curated.quarantine])
    assert hollow == at_fault.keys() & set(names.values()) - {("", "")}


def test_every_signal_has_one_row_a_sample_in_order(curated: Curated) -> None:
    for signal in build_signals(SETTINGS):
        for shard in curated.pool.shards:
            ids = curated.warehouse.read_table(shard.path, ["sample_id"])
            assert curated.warehouse.read_table(signal.ref.table(shard), ["sample_id"]).equals(ids), signal.name


def test_captions_are_stored_as_they_came(curated: Curated) -> None:
    stored = {sample["key"]: sample["caption"] for sample in curated.samples}
    assert {key: stored[key] for key in CAPTIONS} == CAPTIONS


def test_nothing_beside_the_warehouse_is_written_or_changed(curated: Curated) -> None:
    assert everything_below(curated.root) == curated.before


def test_the_second_time_all_is_cached_and_the_same(curated: Curated) -> None:
    ingested, pool, snapshot, cached = curate(curated.root / "source", curated.warehouse)
    assert (ingested, pool, snapshot) == (curated.ingested, curated.pool, curated.snapshot)
    assert not any(curated.cached)
    assert all(cached)


def test_other_peoples_text_is_only_text_in_the_report(curated: Curated) -> None:
    page = Page(curated.report())
    assert not page.all("script")
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    sources = [attributes["src"] for attributes in page.all("img")]
    assert sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert INJECTION in page.text
    assert len(curated.report()) < 5_000_000


def test_the_catalog_reads_it_all(curated: Curated) -> None:
    write_catalog(curated.warehouse)
    with connect(curated.warehouse) as catalog:
        (samples,) = catalog.execute("SELECT count(*) FROM samples").fetchone()
        found = catalog.execute("SELECT caption FROM samples WHERE key = ?", [MARKUP]).fetchall()
    assert samples == curated.pool.rows
    assert found == [(MARKUP,)]


def test_what_changed_can_be_told(curated: Curated) -> None:
    changes = curated.warehouse.read_table(curated.snapshot.difference)
    kept = pa.array(sorted(i for i, decision in curated.decisions.items() if decision["kept"]), pa.string())
    assert changes["sample_id"].combine_chunks().equals(kept)
    assert "new sample" in difference_markdown(curated.snapshot, warehouse=curated.warehouse)
