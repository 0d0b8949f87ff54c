"""The shipped document policies, against each recipe's rule written out in plain Python over the source's documents."""

import functools
import io
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import ftlangdetect
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from storage.warehouse import Warehouse
from tasks.curation.interleaved.ingest import ingest_documents
from tasks.curation.sample_documents import write_sample_documents
from tasks.curation.signals.language import place_model
from tests.tasks.curation.interleaved.chain import CLIP, Tables, judge, publish, published, shipped
from tests.tasks.curation.source_files import write_lines
from tests.tasks.curation.test_published_recipes import clean_words, repetition, special

Row = dict[str, Any]
RNG = np.random.default_rng(11)

# -- OBELICS --------------------------------------------------------------------------------------------------

STOP = {"the", "of", "in", "a", "is", "and", "it", "on", "this", "to", "was", "for", "with", "there", "you", "we", "at"}
SENTENCES = [
    "The house on the hill was built for a family of farmers in the valley.",
    "There is a garden with roses, and it is open to everyone in the summer.",
    "We walked to the river and sat on the grass for a while.",
    "This was the best day of the whole journey.",
    "of the",
    "Roses roses tulips",
    "Buy cheap tickets online today",
    "the 1234567890 of 1234567890 in",
    "Das Haus auf dem Berg wurde von einer Familie gebaut.",
    "It is damn hot in the city",
    "the cat the cat the cat the cat the cat the cat the cat the cat in",
    "a " * 1001,
]
KINDS = {"JPEG": "jpeg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
SIDES = [(200, 200), (200, 200), (300, 200), (149, 150), (150, 150), (301, 150), (300, 150), (150, 301), (400, 250)]


@functools.cache
def image_file(kind: str, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width % 256, height % 256, 7)).save(buffer, kind)
    return buffer.getvalue()


def random_document(folder: Path, number: int) -> Row:
    """A document of some texts and images in random order, as OBELICS has it, written as paths."""
    texts: list[str | None] = []
    images: list[str | None] = []
    count = int(RNG.choice([1, 2, 4, 8, 40], p=[0.2, 0.3, 0.3, 0.1, 0.1]))
    for at in range(count):
        if RNG.random() < (0.9 if count == 40 else 0.4):
            kind = str(RNG.choice(list(KINDS), p=[0.5, 0.3, 0.15, 0.05]))
            width, height = SIDES[RNG.integers(len(SIDES))]
            name = f"{kind}{width}x{height}"
            if RNG.random() < 0.05:
                name = "gone"
            else:
                (folder / name).write_bytes(image_file(kind, width, height))
            images, texts = [*images, name], [*texts, None]
        else:
            weights = np.array([6, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1, 0.3])
            chosen = RNG.choice(SENTENCES, int(RNG.integers(1, 4)), p=weights / weights.sum())
            images, texts = [*images, None], [*texts, " ".join(chosen) + (f" {at}" if RNG.random() < 0.3 else "")]
    return {"key": str(number), "texts": texts, "images": images}


def shares(words: list[str]) -> tuple[float, float]:
    of = max(1, len(words))
    return sum(word in STOP for word in words) / of, words.count("damn") / of


def obelics_image(name: str) -> list[str]:
    if name == "gone":
        return ["missing"]
    kind = next(kind for kind in KINDS if name.startswith(kind))
    width, height = map(int, name.removeprefix(kind).split("x"))
    passes = {
        "format": KINDS[kind] in ("jpg", "jpeg", "png", "webp"),
        "side": 150 <= width <= 20_000 and 150 <= height <= 20_000,
        "aspect": 1 / 2 <= width / height <= 2,
    }
    return [reason for reason, is_met in passes.items() if not is_met]


def obelics_text(text: str) -> list[str]:
    words = clean_words(text)
    stop, flagged = shares(words)
    passes = {
        "words": 4 <= len(words) <= 1000,
        "character_repetition": repetition(list(text), often_only=True) <= 0.1,
        "special_characters": special(text) <= 0.3,
        "stop_words": stop >= 0.3,
        "flagged_words": flagged <= 0.01,
    }
    return [reason for reason, is_met in passes.items() if not is_met]


def obelics_document(texts: list[str], images: int) -> list[str]:
    """The rules for a document on the texts that are left, and the number of images that are."""
    text = "\n\n".join(texts)
    words = clean_words(text)
    stop, flagged = shares(words)
    found = ftlangdetect.detect(text.replace("\n", " "), low_memory=True) if text else {"lang": "", "score": 0}
    passes = {
        "images": 1 <= images <= 30,
        "words": 10 <= len(words) <= 2000,
        "character_repetition": repetition(list(text), often_only=True) <= 0.1,
        "special_characters": special(text) <= 0.275,
        "stop_words": stop >= 0.35,
        "flagged_words": flagged <= 0.01,
        "language": found["lang"] == "en" and found["score"] >= 0.8,
    }
    return [reason for reason, is_met in passes.items() if not is_met]


def test_obelics_keeps_what_its_rules_keep_for_their_reasons_in_the_sources_order(
    warehouse: Warehouse, source: Path
) -> None:
    place_model()
    rows = [random_document(source, number) for number in range(150)]
    write_lines(source / "documents.jsonl", rows)
    documents = ingest_documents(str(source), pool="p", warehouse=warehouse, shard_documents=60).ref
    (source.parent / "stop.txt").write_text("\n".join(sorted(STOP)))
    (source.parent / "flagged.txt").write_text("damn\n")
    words = {
        name: str(source.parent / f"{name.removesuffix('_words')}.txt") for name in ("stop_words", "flagged_words")
    }
    measure = ("size", "characters", "words", "language")
    judged = judge(warehouse, documents, shipped("obelics"), measure=measure, **words)
    tables = Tables.read(warehouse, judged)
    kept = published(warehouse, publish(warehouse, judged))
    reasons: dict[str, int] = {}
    for row in rows:
        failed = [
            obelics_text(text) if text is not None else obelics_image(image)
            for text, image in zip(row["texts"], row["images"], strict=True)
        ]
        assert [node["failed"] for node in tables.nodes[row["key"]]] == failed
        left = [at for at, found in enumerate(failed) if not found]
        texts = [row["texts"][at] for at in left]
        expected = obelics_document([text for text in texts if text is not None], texts.count(None))
        assert tables.decisions[row["key"]]["failed"] == expected
        assert (row["key"] in kept) == (not expected)
        if not expected:
            assert kept[row["key"]]["texts"] == texts
            stored = [image and image["bytes"] for image in kept[row["key"]]["images"]]
            assert stored == [row["images"][at] and (source / row["images"][at]).read_bytes() for at in left]
        for reason in (*expected, *(f"node {name}" for found in failed for name in found)):
            reasons[reason] = reasons.get(reason, 0) + 1
    assert 10 < len(kept) < 140
    policy = judged.policy
    names = {c.name for c in policy.documents} | {f"node {c.name}" for c in (*policy.texts, *policy.images.conditions)}
    names.remove("flagged_words")  # where no text has more than 1 %, all together have not either
    assert set(reasons) == names | {"node missing"}, "each rule must have been met and not met"


# -- MMC4 -----------------------------------------------------------------------------------------------------


def cosines(images: list[bytes], texts: list[str]) -> np.ndarray:
    """Similarity of each image and each text, by open_clip itself."""
    model, preprocess = clip()
    tokenize = open_clip.get_tokenizer(CLIP)
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(data)).convert("RGB")) for data in images])
        found = model.encode_image(pixels, normalize=True) @ model.encode_text(tokenize(texts), normalize=True).T
    similarity: np.ndarray = found.numpy()
    return similarity


@functools.cache
def clip() -> Any:
    model, _, preprocess = open_clip.create_model_and_transforms(CLIP, require_pretrained=True)
    return model.eval(), preprocess


def mmc4_assignment(similarity: np.ndarray) -> list[int]:
    """One to one with the largest sum, by trying all; leftovers to their most similar text."""
    images, texts = similarity.shape
    if images <= texts:
        ways = permutations(range(texts), images)
        return list(max(ways, key=lambda way: sum(similarity[at, to] for at, to in enumerate(way))))
    ways = permutations(range(images), texts)
    best = max(ways, key=lambda way: sum(similarity[at, to] for to, at in enumerate(way)))
    return [best.index(at) if at in best else int(similarity[at].argmax()) for at in range(images)]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmc4")
    write_sample_documents(folder, documents=30, seed=3)
    lines = (folder / "documents.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    crowded = {**row, "url": "crowded", "text_list": row["text_list"][:1]}  # more images than texts
    wordless = {**row, "url": "wordless", "text_list": []}
    write_lines(folder / "documents.jsonl", [*map(json.loads, lines), crowded, wordless])
    return folder


@pytest.mark.parametrize("similarity_min", [0.15, -1.0])
def test_mmc4_places_images_as_its_assignment_does(warehouse: Warehouse, planted: Path, similarity_min: float) -> None:
    documents = ingest_documents(str(planted), pool="p", warehouse=warehouse).ref
    unsafe = {}
    for shard in documents.images.shards:
        unsafe = dict.fromkeys(warehouse.read_table(shard.path)["sample_id"].to_pylist()[::9], 0.5)
    policy = shipped("mmc4", similarity_min=similarity_min)
    judged = judge(warehouse, documents, policy, measure=("size", "caption", "clip"), known=unsafe)
    tables = Tables.read(warehouse, judged)
    kept = published(warehouse, publish(warehouse, judged))
    moved = 0
    for line in (planted / "documents.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts, names = row["text_list"], [info["image_name"] for info in row["image_info"]]
        nodes = tables.nodes[row["url"]]
        ids = [node["sample_id"] for node in nodes if node["kind"] == "image"]
        data = [(planted / name).read_bytes() if (planted / name).exists() else None for name in names]
        similarity = (
            cosines([image or data[-1] for image in data], texts) if data and texts else np.zeros((len(data), 0))
        )
        staying = [
            at
            for at, image in enumerate(data)
            if image is not None
            and min(Image.open(io.BytesIO(image)).size) >= 150
            and unsafe.get(ids[at], 0) < 0.5
            and similarity[at].max(initial=-9) >= similarity_min
        ]
        assert (row["url"] in kept) == bool(staying), row["url"]
        if not staying:
            assert tables.decisions[row["url"]]["failed"] == (["images"] if texts else ["images", "texts"])
            continue
        assigned = mmc4_assignment(similarity[staying])
        expected: list[str | bytes | None] = []
        for number, text in enumerate(texts):
            expected += [data[at] for at, to in zip(staying, assigned, strict=True) if to == number] + [text]
        found = kept[row["url"]]
        both = zip(found["images"], found["texts"], strict=True)
        assert [text if image is None else image["bytes"] for image, text in both] == expected
        moved += assigned != sorted(assigned)
        of_images = [node["similarity"] for node in found["nodes"] if node["sample_id"]]
        order = sorted(range(len(staying)), key=lambda at: (assigned[at], staying[at]))
        assert of_images == pytest.approx([similarity[staying[at], assigned[at]] for at in order], abs=2e-3)
    assert moved > 3, "the source's order must not be the answer"


def test_most_images_find_the_sentence_that_describes_them(warehouse: Warehouse, source: Path) -> None:
    truth = write_sample_documents(source, documents=60, seed=5)
    documents = ingest_documents(str(source), pool="p", warehouse=warehouse).ref
    policy = shipped("mmc4", similarity_min=-1)
    judged = judge(warehouse, documents, policy, measure=("size", "caption", "clip"), known={})
    tables = Tables.read(warehouse, judged)
    right = total = 0
    for planted in truth:
        if planted.fault in ("", "junk_text", "missing_image", "small_image"):
            nodes = tables.nodes[planted.key]
            numbers = [node["position"] for node in nodes if node["kind"] == "text"]
            images = [node for node in nodes if node["kind"] == "image"]
            pairs = [
                (numbers.index(n["text_position"]), to)
                for n, to in zip(images, planted.images, strict=True)
                if n["kept"]
            ]
            right += sum(found == to for found, to in pairs)
            total += len(pairs)
    assert total > 90
    assert right / total >= 0.8
