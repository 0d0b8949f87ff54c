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
    found = _Embeddings(measured)
    documents = warehouse.read_table(shard.path, ["segments"])["segments"].to_pylist()
    illustrated = [segments for segments in documents if any(found.has(segment["sample_id"]) for segment in segments)]
    texts = _embedded(
        clip, [segment["text"] for segments in illustrated for segment in segments if segment["text"] is not None]
    )
    rows: dict[str, dict[str, Any]] = {name: {"sample_id": name} for name in found.ids}
    begin = 0
    for segments in illustrated:
        positions = [at for at, segment in enumerate(segments) if segment["text"] is not None]
        own = texts[begin : begin + len(positions)]
        begin += len(positions)
        for name in filter(found.has, (segment["sample_id"] for segment in segments)):
            rows[name] |= _row(found.of(name) @ own.T, positions)
    table = pa.Table.from_pylist([rows[name] for name in found.ids], pa.schema([SAMPLE_ID, *COLUMNS]))
    warehouse.write_table(ref.table(images), table)
    return Outcome(ref, cached=False)


class _Embeddings:
    """Image embeddings by sample."""

    def __init__(self, table: pa.Table) -> None:
        batches = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
        self.ids: list[str] = table["sample_id"].to_pylist()
        self._vectors, usable = stored_embeddings(batches[0])
        names = [name for name, is_usable in zip(self.ids, usable.tolist(), strict=True) if is_usable]
        self._place = {name: at for at, name in enumerate(names)}

    def has(self, sample_id: str | None) -> bool:
        return sample_id in self._place

    def of(self, sample_id: str) -> Vectors:
        vector: Vectors = self._vectors[self._place[sample_id]]
        return vector


def _embedded(clip: Clip, texts: list[str]) -> Vectors:
    parts = [clip.embed_texts(texts[at : at + TEXTS]) for at in range(0, len(texts), TEXTS)]
    return np.concatenate([np.empty((0, clip.checkpoint.embedding_size), np.float32), *parts])


def _row(cosines: Vectors, positions: list[int]) -> dict[str, Any]:
    if not positions:
        return {"text_similarity": []}
    best = int(cosines.argmax())
    return {
        "best_similarity": float(cosines[best]),
        "best_text": positions[best],
        "text_similarity": cosines.tolist(),
    }
