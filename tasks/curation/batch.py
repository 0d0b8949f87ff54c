"""A batch: what signals measure at once, read from a shard and decoded in threads while earlier ones are measured.

Every image is opened once and decoded in full at most once, whoever asks; how far a signal's image is decoded is the
signal's own setting, so that no value depends on which other signals happened to be missing. What signals keep of the
pixels is taken at once, so memory holds the pixels of one image a thread, whatever there is to score.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.decode import EncodedImage, Header, Pixels, Undecodable

if TYPE_CHECKING:
    from tasks.curation.signals.contract import Signal

ROWS = 128
"""Samples in a batch: what a model sees at once."""

BATCH_BYTES = 32 * 2**20
"""Bytes of a shard's samples above which a batch has fewer rows: a few batches are in memory at once."""

AHEAD = 2
"""Batches that are decoded ahead of the one being measured."""

KEPT_BYTES = 64 * 2**20
"""Largest memory that a thread keeps to decode the next image into."""

_CHUNK = 8
"""Images that a thread takes at a time."""


class Needs(IntEnum):
    """What a signal needs of a sample's image; each level includes those before it."""

    NOTHING = 0
    HEADER = 1
    PIXELS = 2


@dataclass(frozen=True)
class Batch:
    """Samples to be measured, in the shard's order; every list has one entry a sample.

    `images` are the original bytes and `headers` what they say, None where there are none or they can't be read; both
    are empty if only captions were read. `views` are what the signal's own `view` kept of each image, None where it
    can't be decoded. For a signal with a `source`, `measured` has the source's columns; captions are null then, and
    the rest is empty.
    """

    captions: pa.StringArray
    images: Sequence[bytes | None] = ()
    headers: Sequence[Header | None] = ()
    views: Sequence[Any] = ()
    measured: pa.RecordBatch | None = None

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class ReadBatch:
    """A batch's samples as read: `views` by signal, and the error by row for images that failed to decode."""

    sample_ids: pa.StringArray
    captions: pa.StringArray
    images: list[bytes | None]
    headers: list[Header | None]
    views: dict["Signal", list[Any]]
    errors: dict[int, Exception]

    def for_signal(self, signal: "Signal") -> Batch:
        """Return the batch as `signal` is to see it."""
        return Batch(self.captions, self.images, self.headers, self.views.get(signal, ()))


@dataclass
class _Seen:
    """What was made of one image; `views` has one entry a viewer, or none if there are no pixels."""

    header: Header | None = None
    views: list[Any] = field(default_factory=list)
    error: Exception | None = None


@dataclass(frozen=True)
class _Started:
    """Samples that were read and whose images are being looked at, a chunk of images a future."""

    samples: pa.RecordBatch
    images: list[bytes | None]
    seen: list[Future[list[_Seen]]]

    def finish(self, viewers: Sequence["Signal"]) -> ReadBatch:
        """Wait for the images."""
        seen = [one for chunk in self.seen for one in chunk.result()]
        return ReadBatch(
            sample_ids=self.samples.column("sample_id"),
            captions=self.samples.column("caption"),
            images=self.images,
            headers=[one.header for one in seen],
            views={viewer: [one.views[at] if one.views else None for one in seen] for at, viewer in enumerate(viewers)},
            errors={row: one.error for row, one in enumerate(seen) if one.error is not None},
        )


def read_batches(
    parquet: pq.ParquetFile, signals: Sequence["Signal"], *, threads: int, rows: int = ROWS
) -> Iterator[ReadBatch]:
    """Yield a shard's samples in order, at most `rows` at a time, with what `signals` need of them.

    The images are not even read if no signal needs them. Only errors of decoding are kept; an error in a signal's
    `view` is raised.
    """
    viewers = [signal for signal in signals if signal.needs is Needs.PIXELS]
    columns = ["sample_id", "caption"]
    if any(signal.needs is not Needs.NOTHING for signal in signals):
        columns.append("image.bytes")
        rows = min(rows, max(1, BATCH_BYTES // _row_bytes(parquet)))
    started: deque[_Started] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for read in _rows_of(parquet, rows, columns):
                started.append(_start(read, viewers, pool))
                if len(started) > AHEAD:
                    yield started.popleft().finish(viewers)
            while started:
                yield started.popleft().finish(viewers)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _rows_of(parquet: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Read row group by row group; asked for all at once, pyarrow would keep every one it has read."""
    for group in range(parquet.num_row_groups):
        yield from parquet.iter_batches(rows, row_groups=[group], columns=columns)


def _row_bytes(parquet: pq.ParquetFile) -> int:
    """Mean size of a row, uncompressed, at least 1."""
    metadata = parquet.metadata
    total = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
    return max(1, int(total // max(1, metadata.num_rows)))


def _start(read: pa.RecordBatch, viewers: Sequence["Signal"], pool: ThreadPoolExecutor) -> _Started:
    """Take the images out of Arrow, so that its buffers can go, and hand them to the threads."""
    images = read.column("image").field("bytes").to_pylist() if "image" in read.schema.names else []
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    seen = [pool.submit(_look_at_all, chunk, viewers) for chunk in chunks]
    return _Started(read.select(["sample_id", "caption"]), images, seen)


def _look_at_all(images: Sequence[bytes | None], viewers: Sequence["Signal"]) -> list[_Seen]:
    return [_look_at(data, viewers) for data in images]


def _look_at(data: bytes | None, viewers: Sequence["Signal"]) -> _Seen:
    seen = _Seen()
    if data is None:
        return seen
    try:
        encoded = EncodedImage(data)
        seen.header = encoded.header
    except Exception as error:  # Pillow and the libraries under it raise nearly anything
        seen.error = error
        return seen
    pixels = Pixels(encoded, _memory_for)
    try:
        seen.views = [viewer.view(pixels) for viewer in viewers]
    except Undecodable as error:  # what one can't see, none can: a reduced image has been read to its end too
        seen.error = cast(Exception, error.__cause__)
    return seen


class _Memory(threading.local):
    """What a thread decodes into, again and again: fresh pages would cost about as much as half the decoding."""

    kept = np.empty(0, np.uint8)


_memory = _Memory()


def _memory_for(header: Header) -> npt.NDArray[np.uint8]:
    size = 3 * header.width * header.height
    if _memory.kept.size < size <= KEPT_BYTES:
        _memory.kept = np.empty(size, np.uint8)
    return _memory.kept[:size] if size <= KEPT_BYTES else np.empty(size, np.uint8)
