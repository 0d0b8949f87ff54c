"""Hashes that are equal for equal images: of the file's bytes, and of the pixels whatever the file's format."""

import hashlib
import struct
from dataclasses import dataclass

import pyarrow as pa
import xxhash

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.decode import Pixels
from tasks.curation.signals.contract import Signal


@dataclass(frozen=True)
class ExactHashes(Signal):
    """sha256 of the original bytes, and XXH3-128 of the decoded pixels with their width and height.

    A JPEG and the PNG made from it have the same pixels, so they meet on purpose. XXH3 finds copies and is not meant
    to withstand an adversary who wants two images to meet.
    """

    name = "exact"
    version = 1
    needs = Needs.PIXELS
    columns = pa.schema(
        [
            column("bytes_hash", pa.string(), "sha256 of the image file, 64 hex digits"),
            column("pixels_hash", pa.string(), "XXH3-128 of width, height and upright RGB pixels; null if undecodable"),
        ]
    )

    def view(self, pixels: Pixels) -> str:
        """Return the hash of width and height (32-bit little-endian) and the bytes of all pixels, row by row."""
        height, width, _ = pixels.rgb.shape
        digest = xxhash.xxh3_128(struct.pack("<II", width, height))
        digest.update(pixels.rgb.data)
        return digest.hexdigest()

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        bytes_hashes = [None if data is None else hashlib.sha256(data).hexdigest() for data in batch.images]
        return pa.record_batch(
            [pa.array(bytes_hashes, pa.string()), pa.array(batch.views, pa.string())], schema=self.columns
        )
