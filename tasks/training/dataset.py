"""Turns a split of a snapshot into prompts, completions and images in TRL's conversational form.

The rows go into one Arrow file that is memory-mapped for reading, so neither side holds more than a batch of images.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image, List, Value

from storage.refs import SnapshotRef
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.curation.conditions import Expression, PolicyError, check_expression, evaluate, locked_connection
from tasks.training.recipe import Recipe, RecipeError

MESSAGES = List({"role": Value("string"), "content": Value("string")})
FEATURES = Features(
    {
        "sample_id": Value("string"),
        "prompt": MESSAGES,
        "completion": MESSAGES,
        "images": List(Image(mode="RGB")),
    }
)
BATCH_ROWS = 256

# Parts of an expression that look beyond their row.
_BEYOND_THE_ROW = {
    "SUBQUERY": "a subquery",
    "WINDOW": "a window function",
    "STAR": "a star",
    "PARAMETER": "a parameter",
}


@dataclass(frozen=True)
class Examples:
    """Rows of `FEATURES` in the Arrow file `path`: how many, and how many samples had nothing to answer or ask."""

    path: Path
    rows: int
    left_out: int


def write_examples(snapshot: SnapshotRef, recipe: Recipe, *, split: str, warehouse: Warehouse, path: Path) -> Examples:
    """Write one row of `FEATURES` for each sample of the split that has a prompt and a completion, shard by shard.

    Raises `RecipeError` if an expression can't be used, or if no row is left.
    """
    manifest = read_manifest(warehouse, snapshot)
    if manifest.documents:
        raise RecipeError(
            f"{snapshot} holds interleaved documents, which have no prompts and answers. They can be trained on; "
            "evaluate on a dataset of samples."
        )
    rows = left_out = 0
    with (
        locked_connection() as connection,
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_stream(file, FEATURES.arrow_schema) as writer,
    ):
        for entry in manifest.curated:
            with warehouse.open_parquet(entry.path) as shard:
                expressions = _check_expressions(connection, recipe, shard.schema_arrow)
                for batch in shard.iter_batches(batch_size=BATCH_ROWS):
                    chosen = pa.Table.from_batches([batch]).filter(pc.field("split") == split)
                    usable = _with_texts(connection, chosen, expressions, recipe)
                    rows += usable.num_rows
                    left_out += chosen.num_rows - usable.num_rows
                    writer.write_table(_conversations(usable))
    if rows == 0:
        raise RecipeError(_nothing_left(snapshot, recipe, split, left_out))
    return Examples(path, rows, left_out)


def read_examples(path: Path, limit: int | None = None) -> Dataset:
    """Return the rows of `write_examples`, memory-mapped, ordered by sample_id; only the first `limit` if given."""
    dataset = Dataset.from_file(str(path))
    ids: list[str] = dataset.data["sample_id"].to_pylist()
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return dataset.select(order[:limit], keep_in_memory=True)


def text_of(messages: list[dict[str, Any]]) -> str:
    """Return the text of a row's only message: what the recipe's expression gave."""
    return str(messages[0]["content"])


def _check_expressions(
    connection: duckdb.DuckDBPyConnection, recipe: Recipe, columns: pa.Schema
) -> tuple[Expression, Expression]:
    offered = pa.schema([column for column in columns if not pa.types.is_nested(column.type)])

    def check(field: str) -> Expression:
        sql = getattr(recipe, field)
        try:
            checked = check_expression(connection, sql, what=f"recipe field {field}", columns=offered, parameters={})
        except PolicyError as error:
            quotes = f" Plain text stands in single quotes: '{sql}'." if "not one SQL" in str(error) else ""
            raise RecipeError(f"{error}{quotes}") from None
        return replace(checked, sql=f"(\n{checked.sql}\n)::VARCHAR")

    return check("prompt"), check("completion")


def _with_texts(
    connection: duckdb.DuckDBPyConnection, curated: pa.Table, expressions: tuple[Expression, Expression], recipe: Recipe
) -> pa.Table:
    """Return sample_id, image, prompt and completion of the rows where both texts say something."""
    columns = sorted({"sample_id"}.union(*(expression.columns for expression in expressions)))
    try:
        texts = evaluate(connection, expressions, curated.select(columns), parameters={})
    except duckdb.Error as error:
        raise RecipeError(f"prompt {recipe.prompt!r} or completion {recipe.completion!r} fails: {error}") from None
    rows = curated.select(["sample_id", "image"])
    rows = rows.append_column("prompt", texts["c0"]).append_column("completion", texts["c1"])
    return rows.filter(pc.and_(_filled(texts["c0"]), _filled(texts["c1"])))


def _filled(text: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(text), ""), False)


def _conversations(rows: pa.Table) -> pa.Table:
    """Wrap texts as one message each and the image as a list of one, as TRL expects them."""

    def wrapped(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(range(len(values) + 1), pa.int32()), values)

    def messages(role: str, texts: pa.ChunkedArray) -> pa.Array:
        roles = pa.array([role] * len(texts), pa.string())
        return wrapped(pa.StructArray.from_arrays([roles, texts.combine_chunks()], ["role", "content"]))

    columns = {
        "sample_id": rows["sample_id"],
        "prompt": messages("user", rows["prompt"]),
        "completion": messages("assistant", rows["completion"]),
        "images": wrapped(rows["image"].combine_chunks()),
    }
    return pa.table([columns[name] for name in FEATURES], names=list(FEATURES)).cast(FEATURES.arrow_schema)


def _nothing_left(snapshot: SnapshotRef, recipe: Recipe, split: str, left_out: int) -> str:
    if left_out:
        return (
            f"prompt {recipe.prompt!r} or completion {recipe.completion!r} is null or blank for all {left_out} samples "
            f"of split {split!r} in {snapshot}. Write expressions that have a value."
        )
    return f"{snapshot} has no sample in split {split!r}. Name a split that it has, or curate more samples."
