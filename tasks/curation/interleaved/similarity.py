"""How near each image of a document is to each of its texts in CLIP's space: the evidence that assignment rests on.

Kept as a signal of the images, one number a text, so that who goes where is decided later, among those that stay.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from storage.fingerprint import fingerprint
from storage.record import Record, write_record
from storage.refs import DocumentShardRef, Outcome, ShardRef, SignalRef
from storage.schema import SAMPLE_ID, column
from storage.warehouse import Warehouse
from tasks.curation.columns import EvidenceError
from tasks.curation.signals.clip import Clip, stored_embeddings

VERSION = 1
TEXTS = 256
"""Texts that the model sees at once."""

COLUMNS = pa.schema(
    [
        column("best_similarity", pa.float32(), "largest cosine of the image and a text of its document; null if none"),
        column("best_text", pa.int32(), "position of that text in the document"),
        column(
            "text_similarity",
            pa.list_(pa.float32()),
            "cosine with each text of the document, in order, -1 to 1; null if the image can't be decoded",
        ),
    ]
)

Vectors = npt.NDArray[np.float32]


def similarity_ref(clip: Clip) -> SignalRef:
    """Return where the similarities by a CLIP model lie. Raises `MissingWeights` if it can't be found."""
    return SignalRef("text_similarity", fingerprint([VERSION, clip.ref.fingerprint]))


def measure_similarity(shard: DocumentShardRef, clip: Clip, *, warehouse: Warehouse) -> Outcome[SignalRef]:
    """Compare each image of a shard's documents with each text of its own document, by `clip`'s embeddings.

    The table is one of the images' shard. Images come from the stored embeddings (float16), texts through the same
    model in float32, cut at its context length. Raises `EvidenceError` if `clip` has not measured the images.
    """
    ref, images = similarity_ref(clip), ShardRef(shard.pool, shard.name, 0)
    if warehouse.exists(ref.table(images)) or not warehouse.exists(images.path):
        return Outcome(ref, cached=True)
    if not warehouse.exists(clip.ref.table(images)):
        raise EvidenceError(
            f"{clip.ref.table(images)} is missing: score the images of pool {shard.pool} with clip first."
        )
    write_record(
        warehouse, f"{ref.folder}/signal.json", Record("signal", ref.fingerprint, {"clip": clip.ref.fingerprint}, {})
    )
    measured = warehouse.read_table(clip.ref.table(images), ["sample_id", "image_embedding"]).combine_chunks()
    found = _Embeddings.read(measured)
    rows: dict[str, dict[str, Any]] = {}
    for document in warehouse.read_table(shard.path, ["segments"])["segments"].to_pylist():
        rows |= _of_document(document, found, clip)
    table = pa.Table.from_pylist([rows[name] for name in found.ids], pa.schema([SAMPLE_ID, *COLUMNS]))
    warehouse.write_table(ref.table(images), table)
    return Outcome(ref, cached=False)


class _Embeddings:
    """Image embeddings by sample."""

    def __init__(self, ids: list[str], vectors: Vectors, place: npt.NDArray[np.int64]) -> None:
        self.ids, self.vectors = ids, vectors
        self.place = dict(zip(ids, place.tolist(), strict=True))

    @classmethod
    def read(cls, table: pa.Table) -> "_Embeddings":
        batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        vectors, usable = stored_embeddings(batches[0])
        return cls(table["sample_id"].to_pylist(), vectors, np.where(usable, np.cumsum(usable) - 1, -1))


def _of_document(segments: list[dict[str, Any]], found: _Embeddings, clip: Clip) -> dict[str, dict[str, Any]]:
    """The rows of one document's images by sample."""
    images = [segment["sample_id"] for segment in segments if segment["sample_id"]]
    positions = [at for at, segment in enumerate(segments) if segment["kind"] == "text"]
    rows: dict[str, dict[str, Any]] = {name: {"sample_id": name} for name in images}
    seen = [name for name in images if found.place[name] >= 0]
    if not seen:
        return rows
    texts = [segments[at]["text"] for at in positions]
    parts = [clip.embed_texts(texts[at : at + TEXTS]) for at in range(0, len(texts), TEXTS)]
    cosines = found.vectors[[found.place[name] for name in seen]] @ np.concatenate(parts).T if parts else None
    for at, name in enumerate(seen):
        if cosines is None:
            rows[name] |= {"text_similarity": []}
            continue
        best = int(cosines[at].argmax())
        rows[name] |= {
            "best_similarity": float(cosines[at, best]),
            "best_text": positions[best],
            "text_similarity": cosines[at].tolist(),
        }
    return rows
