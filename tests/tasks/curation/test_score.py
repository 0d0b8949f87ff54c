import json
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from storage import schema
from storage.catalog import connect
from storage.refs import ShardRef
from storage.warehouse import Warehouse
from tasks.curation import batch, decode
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels
from tasks.curation.known_ids import KnownIds
from tasks.curation.score import score_shard
from tasks.curation.signals import MissingWeights, Signal, SignalSettings, build_signals
from tasks.curation.signals.exact import ExactHashes
from tasks.curation.signals.language import Language
from tasks.curation.signals.size import Size
from tests.tasks.curation.images import encoded, kinds_of_files, photograph, write_shard

CLIP = f"local-dir:{files('tasks.sample_models')}/clip"
FILES = kinds_of_files()
BROKEN = {"truncated": FILES["jpeg"][:-400], "bogus": b"<html>not found</html>", "empty": b""}


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path / "warehouse"))


@pytest.fixture
def shard(warehouse: Warehouse) -> ShardRef:
    """Every kind of file, and three that are broken."""
    return write_shard(warehouse, [*FILES.values(), *BROKEN.values()])


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often images are opened and decoded, and each signal measures."""
    found: Counter[str] = Counter()

    def counting(owner: Any, name: str, key: str) -> None:
        original = getattr(owner, name)

        def counted(self: Any, *arguments: Any) -> Any:
            found[key] += 1
            return original(self, *arguments)

        monkeypatch.setattr(owner, name, counted)

    counting(decode.EncodedImage, "__init__", "opened")
    counting(decode.EncodedImage, "decode", "decoded")
    for signal in every_signal():
        counting(type(signal), "measure", signal.name)
    return found


def every_signal() -> list[Signal]:
    return build_signals(SignalSettings(clip_model=CLIP))


def tables(warehouse: Warehouse, shard: ShardRef, signals: list[Signal]) -> dict[str, bytes]:
    return {signal.name: warehouse.read_bytes(signal.ref.table(shard)) for signal in signals}


def test_every_signal_gets_a_table_with_the_shards_samples_in_order(warehouse: Warehouse, shard: ShardRef) -> None:
    signals = every_signal()
    outcomes = score_shard(shard, signals, warehouse=warehouse)
    assert [outcome.ref for outcome in outcomes] == [signal.ref for signal in signals]
    assert not any(outcome.cached for outcome in outcomes)
    ids = warehouse.read_table(shard.path)["sample_id"].to_pylist()
    for signal in signals:
        table = warehouse.read_table(signal.ref.table(shard))
        assert table.schema.equals(pa.schema([schema.SAMPLE_ID, *signal.columns]), check_metadata=True)
        assert table["sample_id"].to_pylist() == ids


def test_every_image_is_opened_and_decoded_once_for_all_signals(
    warehouse: Warehouse, shard: ShardRef, counts: Counter[str]
) -> None:
    score_shard(shard, every_signal(), warehouse=warehouse)
    assert counts["opened"] == shard.rows
    assert counts["decoded"] == shard.rows - 2  # two of the broken ones can't even be opened


def test_what_is_there_is_cached_and_nothing_is_read(
    warehouse: Warehouse, shard: ShardRef, counts: Counter[str]
) -> None:
    score_shard(shard, every_signal(), warehouse=warehouse)
    counts.clear()
    assert all(outcome.cached for outcome in score_shard(shard, every_signal(), warehouse=warehouse))
    assert not counts


def test_only_missing_signals_are_measured(warehouse: Warehouse, shard: ShardRef, counts: Counter[str]) -> None:
    score_shard(shard, [Size(), Language()], warehouse=warehouse)
    assert counts["decoded"] == 0
    counts.clear()
    outcomes = score_shard(shard, [Size(), Language(), ExactHashes()], warehouse=warehouse)
    assert [outcome.cached for outcome in outcomes] == [True, True, False]
    assert (counts["size"], counts["language"], counts["exact"]) == (0, 0, 1)


def test_captions_are_measured_without_reading_images(
    warehouse: Warehouse, shard: ShardRef, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    original = pq.ParquetFile.iter_batches

    def watched(self: Any, *arguments: Any, columns: list[str], **options: Any) -> Any:
        asked.append(columns)
        return original(self, *arguments, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    score_shard(shard, [Language()], warehouse=warehouse)
    assert asked == [["sample_id", "caption"]]  # one row group
    assert counts["opened"] == 0


def test_memory_holds_one_row_group_whatever_the_shards_size(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.warehouse.ROW_GROUP_BYTES", 2**20)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    shard = write_shard(warehouse, [encoded(Image.fromarray(noise), "BMP")] * 100)
    before = pa.default_memory_pool().bytes_allocated()
    most = 0
    with warehouse.open_parquet(shard.path) as parquet:
        for _ in batch.read_batches(parquet, [Size()], threads=1):
            most = max(most, pa.default_memory_pool().bytes_allocated() - before)
    assert most < 10 * 2**20  # of 26 MiB


def test_a_value_does_not_depend_on_what_else_was_missing(tmp_path: Path) -> None:
    together, apart = Warehouse(str(tmp_path / "together")), Warehouse(str(tmp_path / "apart"))
    shards = [write_shard(warehouse, list(FILES.values())) for warehouse in (together, apart)]
    score_shard(shards[0], every_signal(), warehouse=together, threads=3)
    for signal in reversed(every_signal()):
        score_shard(shards[1], [signal], warehouse=apart, threads=1)
    assert tables(together, shards[0], every_signal()) == tables(apart, shards[1], every_signal())


@pytest.mark.parametrize("phash_decode", ["full", "scaled"])
def test_a_perceptual_hash_does_not_depend_on_whether_pixels_were_needed_anyway(
    tmp_path: Path, phash_decode: Literal["full", "scaled"]
) -> None:
    together, apart = Warehouse(str(tmp_path / "together")), Warehouse(str(tmp_path / "apart"))
    images = [encoded(photograph(401, 299, seed), "JPEG") for seed in range(9)] + [BROKEN["truncated"]]
    both = build_signals(SignalSettings(measure=("exact", "perceptual"), phash_decode=phash_decode))
    shards = [write_shard(warehouse, images) for warehouse in (together, apart)]
    score_shard(shards[0], both, warehouse=together)
    score_shard(shards[1], both[1:], warehouse=apart)
    assert tables(together, shards[0], both[1:]) == tables(apart, shards[1], both[1:])


def test_a_jpeg_is_not_decoded_in_full_if_nothing_needs_it(warehouse: Warehouse, counts: Counter[str]) -> None:
    signals = build_signals(SignalSettings(measure=("perceptual",), phash_decode="scaled"))
    files = [encoded(photograph(401, 299), kind) for kind in ("JPEG", "PNG")]
    score_shard(write_shard(warehouse, files), signals, warehouse=warehouse)
    assert counts["decoded"] == 1


def test_rows_stay_in_order_over_many_batches_and_row_groups(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "ROWS", 16)
    monkeypatch.setattr("storage.warehouse.ROW_GROUP_BYTES", 50_000)
    images = [encoded(photograph(20 + number, 10), "PNG") for number in range(100)]
    shard = write_shard(warehouse, images)
    with warehouse.open_parquet(shard.path) as parquet:
        assert parquet.num_row_groups > 1
    score_shard(shard, [Size(), ExactHashes()], warehouse=warehouse, threads=4)
    assert warehouse.read_table(Size().ref.table(shard))["width"].to_pylist() == [20 + n for n in range(100)]
    hashes = warehouse.read_table(ExactHashes().ref.table(shard))["pixels_hash"].to_pylist()
    assert len(set(hashes)) == 100


def test_images_too_large_to_keep_memory_for_are_measured_alike(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [encoded(photograph(60, 40, seed), "JPEG") for seed in range(10)]
    signals = build_signals(SignalSettings(measure=("exact", "perceptual")))
    expected = Warehouse(f"{warehouse.root}-expected")
    score_shard(write_shard(expected, images), signals, warehouse=expected)
    monkeypatch.setattr(batch, "KEPT_BYTES", 1000)
    shard = write_shard(warehouse, images)
    score_shard(shard, signals, warehouse=warehouse)
    assert tables(warehouse, shard, signals) == tables(expected, shard, signals)


def test_broken_images_get_nulls_and_a_quarantine_row_and_stay_in_the_pool(
    warehouse: Warehouse, shard: ShardRef
) -> None:
    signals = every_signal()
    score_shard(shard, signals, warehouse=warehouse)
    with connect(warehouse) as catalog:
        rows = catalog.execute("SELECT key, reason, size FROM quarantine WHERE pool = 'pool' ORDER BY key").fetchall()
        assert catalog.execute("SELECT count(*) FROM samples").fetchall() == [(shard.rows,)]
    first = len(FILES)
    sizes = [len(data) for data in BROKEN.values()]
    reasons = ["truncated", "not_an_image", "empty"]
    assert rows == [(f"key {first + i}", reasons[i], sizes[i]) for i in range(3)]
    for name, column in (
        ("exact", "pixels_hash"),
        ("perceptual", "phash"),
        ("clip", "clip_score"),
        ("nsfw", "nsfw_score"),
    ):
        signal = next(s for s in signals if s.name == name)
        found = warehouse.read_table(signal.ref.table(shard))[column].to_pylist()
        assert [value is None for value in found] == [False] * first + [True] * 3


def test_a_broken_image_is_quarantined_once_whatever_is_scored_later(warehouse: Warehouse, shard: ShardRef) -> None:
    score_shard(shard, [ExactHashes()], warehouse=warehouse)
    score_shard(shard, every_signal(), warehouse=warehouse)
    names = warehouse.names("quarantine/pool")
    assert names == [f"undecodable-{shard.name}.parquet"]
    ids = KnownIds(warehouse, "quarantine/pool", "quarantine_id")
    ids.refresh()
    for row in warehouse.read_table(f"quarantine/pool/{names[0]}").to_pylist():
        assert row["quarantine_id"] in ids


def test_the_record_beside_the_tables_says_how_they_were_measured(warehouse: Warehouse, shard: ShardRef) -> None:
    (outcome,) = score_shard(shard, [ExactHashes()], warehouse=warehouse)
    record = json.loads(warehouse.read_bytes(f"{outcome.ref.folder}/signal.json"))
    assert record["fingerprint"] == outcome.ref.fingerprint
    assert record["config"]["name"] == "exact"
    assert record["config"]["parameters"] == {"decoding": decode.VERSION}
    assert "pillow" in record["result"]["first_measured_with"]


def test_missing_weights_are_told_before_anything_is_measured(
    warehouse: Warehouse, shard: ShardRef, counts: Counter[str]
) -> None:
    signals = [Size(), *build_signals(SignalSettings(measure=("clip",), clip_model="local-dir:/nowhere"))]
    with pytest.raises(MissingWeights, match="/nowhere"):
        score_shard(shard, signals, warehouse=warehouse)
    assert not counts
    assert not warehouse.names("signals")


@dataclass(frozen=True)
class Brightness(Signal):
    """A signal as a user would add one; `wrong` makes it return too few rows."""

    wrong: bool = False

    name = "brightness"
    version = 1
    needs = Needs.PIXELS
    columns = pa.schema([schema.column("brightness", pa.float64(), "mean of all channels, 0-255")])

    def view(self, pixels: Pixels) -> float:
        return float(pixels.rgb.mean())

    def measure(self, batch: Batch) -> pa.RecordBatch:
        views = batch.views[1:] if self.wrong else batch.views
        return pa.record_batch([pa.array(views, pa.float64())], schema=self.columns)


def test_a_signal_of_ones_own_is_a_class_with_a_view_and_a_measure(warehouse: Warehouse) -> None:
    shard = write_shard(warehouse, [FILES["png"]])
    (outcome,) = score_shard(shard, [Brightness()], warehouse=warehouse)
    value = warehouse.read_table(outcome.ref.table(shard))["brightness"][0].as_py()
    assert value == pytest.approx(np.asarray(photograph()).mean())


def test_a_signal_that_returns_other_rows_than_asked_for_is_refused(warehouse: Warehouse) -> None:
    shard = write_shard(warehouse, [FILES["png"], FILES["jpeg"]])
    with pytest.raises(TypeError, match=r"Brightness\.measure returned 1 rows of"):
        score_shard(shard, [Brightness(wrong=True)], warehouse=warehouse)
    assert not warehouse.exists(Brightness(wrong=True).ref.table(shard))


def test_an_error_in_a_view_is_not_taken_for_a_broken_image(
    warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Brightness, pixels: Pixels) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(Brightness, "view", fail)
    with pytest.raises(ZeroDivisionError):
        score_shard(write_shard(warehouse, [FILES["png"]]), [Brightness()], warehouse=warehouse)


def test_a_shard_without_samples_gets_empty_tables(warehouse: Warehouse) -> None:
    shard = write_shard(warehouse, [])
    score_shard(shard, [Size(), Language()], warehouse=warehouse)
    assert warehouse.read_table(Size().ref.table(shard)).num_rows == 0
