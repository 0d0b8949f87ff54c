"""Documents written by hand, of texts and two small images, and what a policy makes of them."""

from pathlib import Path
from typing import Any

from storage.refs import PairsRef
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.interleaved.decide import decide_documents
from tasks.curation.interleaved.ingest import ingest_documents
from tasks.curation.interleaved.policy import DocumentPolicy
from tasks.curation.interleaved.publish import Judged
from tasks.curation.pairs.exact import find_exact_pairs
from tests.tasks.curation.interleaved.chain import judge
from tests.tasks.curation.source_files import picture, write_lines

MEASURE = ("size", "caption")


def policy(**content: Any) -> DocumentPolicy:
    splits = {"validation": 0.3, "test": 0.3}
    return DocumentPolicy.model_validate({"name": "p", "splits": splits, **content})


def write(source: Path, *documents: dict[str, Any]) -> None:
    (source / "a.jpg").write_bytes(picture(1))
    (source / "b.jpg").write_bytes(picture(2, size=(48, 32)))
    write_lines(source / "x.jsonl", documents)


def document(key: str, *segments: str) -> dict[str, Any]:
    """A document of texts, and of images where a segment ends like an image's name."""
    is_image = [segment.endswith(".jpg") for segment in segments]
    return {
        "key": key,
        "texts": [None if image else segment for image, segment in zip(is_image, segments, strict=True)],
        "images": [segment if image else None for image, segment in zip(is_image, segments, strict=True)],
    }


def run(warehouse: Warehouse, source: Path, **content: Any) -> Judged:
    documents = ingest_documents(str(source), pool="p", warehouse=warehouse).ref
    return judge(warehouse, documents, policy(**content), measure=MEASURE)


def run_by_bytes(warehouse: Warehouse, source: Path) -> tuple[Judged, list[PairsRef]]:
    """What a policy makes of the documents that keeps one of images of equal bytes, and the pairs it went by."""
    rules = policy(images={"duplicates": {"same": ["bytes"]}, "prefer": ["key asc"]})
    documents = ingest_documents(str(source), pool="p", warehouse=warehouse).ref
    judged = judge(warehouse, documents, policy(), measure=("size", "caption", "exact"))
    exact = next(signal for signal in judged.signals if signal.signal == "exact")
    pairs = [find_exact_pairs(documents.images, exact, column="bytes_hash", warehouse=warehouse).ref]
    images = decide(documents.images, rules.image_policy, judged.signals, pairs, warehouse=warehouse).ref
    ref = decide_documents(documents, rules, images, judged.signals, judged.texts, warehouse=warehouse).ref
    judged = Judged(documents, rules, images, judged.signals, judged.texts, ref)
    return judged, pairs
