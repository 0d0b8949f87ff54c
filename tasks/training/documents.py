"""Turns a split of interleaved documents into conversations with several images, in TRL's form for language modelling.

A document alternates images and texts as a conversation alternates turns: images are shown by the user, and what
follows them is said by the assistant, so that the loss can cover all of it, and each image stays where it belongs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features, Image, List, Value

from storage.refs import SnapshotRef
from storage.snapshot import read_manifest
from storage.warehouse import Warehouse
from tasks.training.dataset import Examples, write_examples
from tasks.training.recipe import Recipe, RecipeError

FEATURES = Features(
    {
        "sample_id": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image(mode="RGB")),
    }
)
BATCH_ROWS = 16
SEPARATOR = "\n\n"
"""What stands between texts that follow each other."""

Message = dict[str, Any]


def write_rows(snapshot: SnapshotRef, recipe: Recipe, *, split: str, warehouse: Warehouse, path: Path) -> Examples:
    """Write what a training on the split sees: its documents, or the recipe's prompts and completions of its samples.

    Raises `RecipeError` as `write_documents` and `write_examples` do.
    """
    if read_manifest(warehouse, snapshot).documents:
        return write_documents(snapshot, split=split, warehouse=warehouse, path=path)
    return write_examples(snapshot, recipe, split=split, warehouse=warehouse, path=path)


def write_documents(snapshot: SnapshotRef, *, split: str, warehouse: Warehouse, path: Path) -> Examples:
    """Write one row of `FEATURES` for each document of the split that has an image and then a text; see `conversation`.

    `read_examples` reads them. Raises `RecipeError` if the snapshot has no documents, or no row is left.
    """
    manifest = read_manifest(warehouse, snapshot)
    if not manifest.documents:
        raise RecipeError(f"{snapshot} holds no interleaved documents. Publish them with the curate-documents flow.")
    rows = left_out = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as writer:
        for entry in manifest.documents:
            with warehouse.open_parquet(entry.path) as shard:
                for batch in shard.iter_batches(BATCH_ROWS, columns=["document_id", "images", "texts", "split"]):
                    chosen = [row for row in batch.to_pylist() if row["split"] == split]
                    examples = [example for row in chosen if (example := _example(row))]
                    rows += len(examples)
                    left_out += len(chosen) - len(examples)
                    writer.write_table(pa.Table.from_pylist(examples, FEATURES.arrow_schema))
    if rows == 0:
        why = f"none of its {left_out} documents has a text behind an image" if left_out else "it has no document"
        raise RecipeError(f"{snapshot}, split {split!r}: {why}. Name another split, or curate more documents.")
    return Examples(path, rows, left_out)


def conversation(texts: Sequence[str | None]) -> tuple[list[Message], int]:
    """Return a document's turns in TRL's form, and how many of its images are in them.

    `texts` has None where an image stands. Images that follow each other, and texts before the first of them, are one
    turn of the user; texts that follow each other one turn of the assistant. Images behind the last text are left out:
    nothing is said about them.
    """
    turns: list[Message] = []
    images = counted = 0
    for text in texts:
        if text is None:
            images += 1
            _turn(turns, "user").append({"type": "image", "text": None})
            continue
        role = "assistant" if images else "user"
        content = _turn(turns, role)
        if content and content[-1]["type"] == "text":
            content[-1]["text"] += SEPARATOR + text
        else:
            content.append({"type": "text", "text": text})
        counted = images
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    return turns, counted if turns else 0


def _turn(turns: list[Message], role: str) -> list[dict[str, Any]]:
    """The parts of the turn under way, which is a new one if the role changes."""
    if not turns or turns[-1]["role"] != role:
        turns.append({"role": role, "content": []})
    content: list[dict[str, Any]] = turns[-1]["content"]
    return content


def _example(row: dict[str, Any]) -> dict[str, Any] | None:
    messages, count = conversation(row["texts"])
    if not messages:
        return None
    images = [image for image in row["images"] if image is not None]
    return {"sample_id": row["document_id"], "messages": messages, "images": images[:count]}
