from pathlib import Path

import pytest
from PIL import Image

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training.dataset import read_examples, text_of, write_examples
from tasks.training.recipe import Recipe, RecipeError

Squares = tuple[Warehouse, SnapshotRef]


def examples(squares: Squares, path: Path, split: str = "train", **fields: str):  # type: ignore[no-untyped-def]
    warehouse, snapshot = squares
    recipe = Recipe(base_model="m", **fields)
    written = write_examples(snapshot, recipe, split=split, warehouse=warehouse, path=path / "examples.arrow")
    return written, read_examples(written.path)


def test_rows_are_conversations_with_one_image(squares: Squares, tmp_path: Path) -> None:
    _, rows = examples(squares, tmp_path, prompt="'What is this?'", completion="caption")
    row = rows[0]
    assert row["prompt"] == [{"role": "user", "content": "What is this?"}]
    assert [message["role"] for message in row["completion"]] == ["assistant"]
    assert text_of(row["completion"]).startswith("A ")
    assert [type(image).__mro__[-2] for image in row["images"]] == [Image.Image]


def test_images_of_every_mode_come_out_as_rgb(squares: Squares, tmp_path: Path) -> None:
    _, rows = examples(squares, tmp_path)
    assert {row["images"][0].mode for row in rows} == {"RGB"}


def test_only_the_split_is_read_and_rows_are_ordered_by_sample_id(squares: Squares, tmp_path: Path) -> None:
    warehouse, _ = squares
    shards = [warehouse.read_table(f"snapshots/squares/curated/{name}.parquet").to_pylist() for name in "ab"]
    wanted = sorted(row["sample_id"] for shard in shards for row in shard if row["split"] == "validation")
    _, rows = examples(squares, tmp_path, split="validation")
    assert rows["sample_id"][:] == wanted


def test_limit_takes_the_first_by_sample_id(squares: Squares, tmp_path: Path) -> None:
    written, rows = examples(squares, tmp_path)
    assert read_examples(written.path, limit=4)["sample_id"][:] == rows["sample_id"][:4]


def test_samples_without_a_completion_are_left_out_and_counted(squares: Squares, tmp_path: Path) -> None:
    written, rows = examples(squares, tmp_path, completion="metadata ->> 'answer'")
    assert (written.rows, written.left_out, len(rows)) == (13, 1, 13)


def test_blank_completions_are_left_out(squares: Squares, tmp_path: Path) -> None:
    written, _ = examples(squares, tmp_path, completion="CASE WHEN key = '0' THEN '  ' ELSE caption END")
    assert (written.rows, written.left_out) == (13, 1)


def test_numbers_become_text(squares: Squares, tmp_path: Path) -> None:
    _, rows = examples(squares, tmp_path, completion="length(caption) - length(caption) + 7")
    assert {text_of(row["completion"]) for row in rows} == {"7"}


@pytest.mark.parametrize(
    ("field", "expression", "message"),
    [
        ("completion", "captoin", 'recipe field completion uses "captoin"'),
        ("completion", "captoin", "caption, key, metadata"),
        ("prompt", "Describe the image.", "Plain text stands in single quotes: 'Describe the image.'"),
        ("prompt", "(SELECT 1)", "recipe field prompt contains a query"),
        ("prompt", "random()", "recipe field prompt calls random()"),
        ("prompt", "read_text('/etc/passwd')", "recipe field prompt calls read_text()"),
        ("completion", "1), (2", "recipe field completion is more than one"),
    ],
)
def test_bad_expressions_are_refused_by_field(
    squares: Squares, tmp_path: Path, field: str, expression: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        examples(squares, tmp_path, **{field: expression})
    assert message in str(caught.value)


def test_a_split_without_samples_is_refused(squares: Squares, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="squares@1 has no sample in split 'dev'"):
        examples(squares, tmp_path, split="dev")


def test_a_completion_that_no_sample_has_is_refused(squares: Squares, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="null or blank for all 14 samples"):
        examples(squares, tmp_path, completion="metadata ->> 'anwser'")
