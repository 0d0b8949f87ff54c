"""A small published snapshot, and one run trained on it, for the tests of training, evaluation and merging."""

import hashlib
import io
import json
import os
import shutil
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from storage.refs import RunRef, SnapshotRef
from storage.schema import CURATED
from storage.snapshot import Draft, FileEntry, Manifest, commit
from storage.warehouse import Warehouse
from tasks.training.recipe import Recipe

COLOURS = ("red", "green", "blue", "yellow")
SPLITS = ("train",) * 14 + ("validation",) * 5 + ("test",) * 5
WITHOUT_ANSWER = 3


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Child processes must not fight over two cores."""
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tiny Gemma 4 that ships with the sample."""
    shipped = Path(str(files("tasks.sample_models"))) / "gemma"
    return Path(shutil.copytree(shipped, tmp_path_factory.mktemp("base") / "gemma"))


@pytest.fixture(scope="session")
def recipe(gemma: Path) -> Recipe:
    """Twelve short steps with dropout and accumulation, saved every second step."""
    return Recipe(
        base_model=str(gemma),
        prompt="'What colour is it?'",
        completion="metadata ->> 'answer'",
        lora_rank=4,
        lora_alpha=8,
        learning_rate=1e-3,
        batch_size=2,
        accumulation=2,
        max_steps=8,
        save_steps=2,
        max_new_tokens=4,
        answer_batch_size=3,
    )


def curated_rows() -> list[dict[str, object]]:
    """One plain-coloured image per row, of several sizes and modes; one train row has no answer."""
    rows = []
    for at, split in enumerate(SPLITS):
        colour = COLOURS[at % len(COLOURS)]
        picture = io.BytesIO()
        size = (40 + 10 * (at % 5), 60)
        mode, kind = (("RGB", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG"))[at // 4 % 4]
        Image.new("RGB", size, colour).convert(mode).save(picture, kind)
        answer = {} if at == WITHOUT_ANSWER else {"answer": f"{colour} square"}
        rows.append(
            {
                "sample_id": hashlib.sha256(str(at).encode()).hexdigest()[:32],
                "key": str(at),
                "image": {"bytes": picture.getvalue(), "path": f"{at}.{kind.lower()}"},
                "caption": f"A {colour} square, number {at}",
                "metadata": json.dumps(answer),
                "split": split,
            }
        )
    return rows


def publish(root: Path) -> tuple[Warehouse, SnapshotRef]:
    """Publish `curated_rows` as a snapshot of two shards."""
    warehouse = Warehouse(str(root))
    entries = []
    for name, rows in (("a", curated_rows()[::2]), ("b", curated_rows()[1::2])):
        path = f"snapshots/squares/curated/{name}.parquet"
        warehouse.write_table(path, pa.Table.from_pylist(rows, schema=CURATED))
        entries.append(FileEntry(path=path, rows=len(rows), bytes=0, sha256=name, pool_shard=name))

    def build(_: Manifest | None) -> Draft:
        return Draft(
            pool="squares",
            pool_shards=("a", "b"),
            policy={},
            signals={},
            pairs={},
            decisions=(),
            curated=tuple(entries),
            holdout=None,
            counts={},
        )

    return warehouse, commit(warehouse, "squares", build).ref


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> tuple[Warehouse, SnapshotRef]:
    """A warehouse with one snapshot of 24 plain squares: 14 to train on (one without an answer), 5 and 5 held out."""
    return publish(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="session")
def trained(squares: tuple[Warehouse, SnapshotRef], recipe: Recipe) -> tuple[RunRef, list[str]]:
    """An undisturbed run on the snapshot, and its log."""
    from tasks.training.fit import train

    warehouse, snapshot = squares
    log: list[str] = []
    return train(snapshot, recipe, warehouse=warehouse, on_log=log.append).ref, log
