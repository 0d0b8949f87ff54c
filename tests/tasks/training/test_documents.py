"""Interleaved documents as conversations; TRL's own collator and a real processor judge where images are."""

import hashlib
import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from storage.catalog import connect
from storage.refs import SnapshotRef
from storage.schema import INTERLEAVED
from storage.snapshot import Draft, FileEntry, commit
from storage.warehouse import Warehouse
from tasks.training import model as models
from tasks.training.collate import LossMaskError
from tasks.training.conversations import ConversationCollator, check_loss, make_collator
from tasks.training.dataset import read_examples, write_examples
from tasks.training.documents import conversation, write_documents
from tasks.training.fit import train
from tasks.training.recipe import Recipe, RecipeError

Parts = tuple[str, ...]
"""A document: texts, and images as the name of a colour behind a #."""

DOCUMENTS: dict[str, Parts] = {
    "plain": ("#red", "A red square.", "#blue", "#green", "Two squares.", "They differ."),
    "led": ("Squares follow.", "#blue", "This is blue.", "#red"),
    "long": ("#red", "One.", "#green", "Two.", "#blue", "Three.", "#yellow", "Four."),
    "silent": ("Nothing is said after this.", "#red"),
    "held_out": ("#green", "Held out."),
}
SIZES = {"red": (64, 64), "green": (200, 80), "blue": (90, 300), "yellow": (640, 480)}
TURNS = {"user": "<|turn>user\n", "assistant": "<|turn>model\n"}


def picture(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", SIZES[colour], colour).convert("P").save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{colour}.png"}


def identity(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Warehouse, SnapshotRef]:
    """A snapshot of `DOCUMENTS` in two shards, written by hand."""
    warehouse = Warehouse(str(tmp_path_factory.mktemp("documents")))
    rows = [
        {
            "document_id": identity(key),
            "key": key,
            "images": [picture(part[1:]) if part.startswith("#") else None for part in parts],
            "texts": [None if part.startswith("#") else part for part in parts],
            "nodes": [{"sample_id": f"{key} {at}" if p.startswith("#") else None} for at, p in enumerate(parts)],
            "split": "test" if key == "held_out" else "train",
        }
        for key, parts in DOCUMENTS.items()
    ]
    entries = []
    for name, part in (("a", rows[:2]), ("b", rows[2:])):
        path = f"snapshots/pages/documents/{name}.parquet"
        warehouse.write_table(path, pa.Table.from_pylist(part, INTERLEAVED))
        entries.append(FileEntry(path, len(part), 0, name, name))
    draft = Draft(
        **{"pool": "p", "pool_shards": (), "policy": {}, "signals": {}, "pairs": {}, "counts": {}},
        **{"decisions": (), "curated": (), "published": None, "documents": tuple(entries)},
    )
    return warehouse, commit(warehouse, "pages", lambda _: draft).ref


@pytest.fixture
def processor(gemma: Path, recipe: Recipe) -> ProcessorMixin:
    return models.load_processor(gemma, recipe)


def rows_of(published: tuple[Warehouse, SnapshotRef], folder: Path, split: str = "train") -> dict[str, dict[str, Any]]:
    warehouse, snapshot = published
    written = write_documents(snapshot, split=split, warehouse=warehouse, path=folder / f"{split}.arrow")
    key_of = {identity(key): key for key in DOCUMENTS}
    rows = read_examples(written.path)
    assert len(rows) == written.rows
    return {key_of[row["sample_id"]]: row for row in rows}


@pytest.mark.parametrize(
    ("texts", "turns", "images"),
    [
        ([None, "a"], ["user: #", "assistant: a"], 1),
        (["a", "b", None, "c", "d"], ["user: a\n\nb | #", "assistant: c\n\nd"], 1),
        ([None, None, "a", None, "b"], ["user: # | #", "assistant: a", "user: #", "assistant: b"], 3),
        ([None, "a", None, None], ["user: #", "assistant: a"], 1),
        (["a", None], [], 0),
        (["a", "b"], [], 0),
        ([], [], 0),
    ],
)
def test_turns_alternate_as_images_and_texts_do(texts: list[str | None], turns: list[str], images: int) -> None:
    messages, counted = conversation(texts)
    shown = [
        f"{message['role']}: "
        + " | ".join("#" if part["type"] == "image" else part["text"] for part in message["content"])
        for message in messages
    ]
    assert (shown, counted) == (turns, images)


def test_rows_hold_the_splits_documents_with_their_images_in_order(
    published: tuple[Warehouse, SnapshotRef], tmp_path: Path
) -> None:
    rows = rows_of(published, tmp_path)
    assert set(rows) == {"plain", "led", "long"}
    assert set(rows_of(published, tmp_path, "test")) == {"held_out"}
    assert [image.size for image in rows["plain"]["images"]] == [SIZES[c] for c in ("red", "blue", "green")]
    assert [image.size for image in rows["led"]["images"]] == [SIZES["blue"]]
    assert {image.mode for row in rows.values() for image in row["images"]} == {"RGB"}


def test_every_image_becomes_its_own_tokens_where_it_stood(
    published: tuple[Warehouse, SnapshotRef], tmp_path: Path, processor: Any
) -> None:
    rows = rows_of(published, tmp_path)
    collate = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    batch = collate([dict(row) for row in rows.values()])
    tokens = processor.tokenizer.convert_tokens_to_ids
    for key, ids in zip(rows, batch["input_ids"], strict=True):
        expected, role = "", ""
        parts = list(DOCUMENTS[key])
        while parts[-1].startswith("#"):
            parts.pop()
        for at, part in enumerate(parts):
            is_image = part.startswith("#")
            said_by = "assistant" if not is_image and any(p.startswith("#") for p in parts[:at]) else "user"
            if said_by != role:
                expected += ("<turn|>\n" if role else "") + TURNS[said_by]
            elif not is_image and not parts[at - 1].startswith("#"):
                expected += "\n\n"
            role = said_by
            expected += f"<|image>{'<|image|>' * soft_tokens(processor, part[1:])}<image|>" if is_image else part
        found = processor.tokenizer.decode(ids).replace("<pad>", "").removeprefix("<bos>")
        assert found == expected + "<turn|>\n"
    count = int((batch["input_ids"] == tokens("<|image>")).sum())
    assert batch["pixel_values"].shape[0] == count == sum(len(row["images"]) for row in rows.values())


def soft_tokens(processor: Any, colour: str) -> int:
    """How many tokens the processor makes of an image alone."""
    chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", SIZES[colour])}]}]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    return int((ids == processor.image_token_id).sum())


def test_the_loss_covers_all_texts_after_an_image_and_no_image(
    published: tuple[Warehouse, SnapshotRef], tmp_path: Path, processor: Any
) -> None:
    rows = rows_of(published, tmp_path)
    batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([dict(r) for r in rows.values()])
    said = {
        key: processor.tokenizer.decode(labels[labels != -100])
        for key, labels in zip(rows, batch["labels"], strict=True)
    }
    assert said == {
        "plain": "A red square.<turn|>Two squares.\n\nThey differ.<turn|>",
        "led": "This is blue.<turn|>",
        "long": "One.<turn|>Two.<turn|>Three.<turn|>Four.<turn|>",
    }


def test_a_model_takes_a_step_on_them(
    published: tuple[Warehouse, SnapshotRef], tmp_path: Path, processor: Any, gemma: Path, recipe: Recipe
) -> None:
    rows = rows_of(published, tmp_path)
    batch = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)([dict(r) for r in rows.values()])
    model = models.load_model(gemma, models.place(recipe))
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert loss > 0


def test_documents_without_a_text_behind_an_image_are_counted(
    published: tuple[Warehouse, SnapshotRef], tmp_path: Path
) -> None:
    warehouse, snapshot = published
    written = write_documents(snapshot, split="train", warehouse=warehouse, path=tmp_path / "x.arrow")
    assert (written.rows, written.left_out) == (3, 1)


def test_snapshots_and_splits_without_documents_are_refused(
    published: tuple[Warehouse, SnapshotRef], squares: tuple[Warehouse, SnapshotRef], tmp_path: Path
) -> None:
    warehouse, snapshot = published
    with pytest.raises(RecipeError, match="pages@1, split 'validation': it has no document"):
        write_documents(snapshot, split="validation", warehouse=warehouse, path=tmp_path / "x.arrow")
    with pytest.raises(RecipeError, match="squares@1 holds no interleaved documents"):
        write_documents(squares[1], split="train", warehouse=squares[0], path=tmp_path / "x.arrow")


def test_a_run_trains_on_documents_and_knows_their_images(
    published: tuple[Warehouse, SnapshotRef], recipe: Recipe
) -> None:
    warehouse, snapshot = published
    run = train(
        snapshot,
        recipe.model_copy(update={"max_steps": 1, "accumulation": 1, "checkpointed_share": 0}),
        warehouse=warehouse,
    ).ref
    [row] = warehouse.read_table(run.table).to_pylist()
    assert (row["samples"], row["steps"]) == (3, 1)
    with connect(warehouse) as catalog:
        query = "SELECT sample_id FROM lineage WHERE run_id = ? AND key = 'plain' ORDER BY sample_id"
        assert catalog.execute(query, [run.run_id]).fetchall() == [("plain 0",), ("plain 2",), ("plain 3",)]
        assert catalog.execute("SELECT DISTINCT split FROM lineage").fetchall() == [("train",)]


def test_a_loss_that_misses_a_turn_or_covers_more_is_refused(
    published: tuple[Warehouse, SnapshotRef], tmp_path: Path, processor: Any
) -> None:
    rows_of(published, tmp_path)
    rows = read_examples(tmp_path / "train.arrow")
    stops = (processor.tokenizer.convert_tokens_to_ids("<turn|>"),)
    check_loss(make_collator(processor, rows, stops), rows)
    template = processor.chat_template
    for broken, message in (
        (template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""), "no token is in the loss"),
        (template.replace("text + '<turn|>'", "text"), "does not end with a stop token"),
        (template.replace("text + '<turn|>'", "text | upper + '<turn|>'"), "the loss covers .* where .* is said"),
    ):
        with pytest.raises(LossMaskError, match=message):
            check_loss(ConversationCollator(processor, stop_ids=stops, chat_template=broken), rows)


def test_documents_have_no_answers_to_evaluate(
    published: tuple[Warehouse, SnapshotRef], recipe: Recipe, tmp_path: Path
) -> None:
    warehouse, snapshot = published
    with pytest.raises(RecipeError, match="pages@1 holds interleaved documents, which have no prompts and answers"):
        write_examples(snapshot, recipe, split="test", warehouse=warehouse, path=tmp_path / "x.arrow")
