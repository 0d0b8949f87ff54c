"""Documents written by hand, of texts and two small images, and what a policy makes of them."""

from pathlib import Path
from typing import Any

from storage.warehouse import Warehouse
from tasks.curation.interleaved.ingest import ingest_documents
from tasks.curation.interleaved.policy import DocumentPolicy
from tasks.curation.interleaved.publish import Judged
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
