"""A batch: what signals measure at once, read from a shard and decoded in threads while earlier ones are measured.

Every image is opened once and decoded at most once, at full size: a perceptual hash or score must not depend on
which other signals happened to be missing. What signals keep of the pixels is taken at once, so memory holds the
pixels of a few images a thread, whatever there is to score.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.decode import EncodedImage, Header

if TYPE_CHECKING:
    from tasks.curation.signals.contract import Signal

ROWS = 128
"""Samples in a batch: what a model sees at once."""

AHEAD = 2
"""Batches that are decoded ahead of the one being measured."""

GROUP_PIXELS = 4 * 2**20
"""Pixels that a thread holds decoded at once, 3 bytes each; an image that has more is decoded alone."""

_CHUNK = 8


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
    can't be decoded.
    """

    captions: pa.StringArray
    images: Sequence[bytes | None] = ()
    headers: Sequence[Header | None] = ()
    views: Sequence[Any] = ()

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
    encoded: EncodedImage | None = None
    header: Header | None = None
    views: list[Any] = field(default_factory=list)
    error: Exception | None = None

    @property
    def bytes_decoded(self) -> int:
        return 0 if self.header is None else 3 * self.header.width * self.header.height


def read_batches(
    parquet: pq.ParquetFile, signals: Sequence["Signal"], *, threads: int, rows: int = ROWS
) -> Iterator[ReadBatch]:
    """Yield a shard's samples in order, `rows` at a time, with what `signals` need of them.

    The images are not even read if no signal needs them. Only errors of decoding are kept; an error in a signal's
    `view` is raised.
    """
    needs = max(signal.needs for signal in signals)
    viewers = [signal for signal in signals if signal.needs is Needs.PIXELS]
    columns = ["sample_id", "caption", *(["image.bytes"] if needs else [])]
    waiting: deque[tuple[pa.RecordBatch, list[bytes | None], list[Future[list[_Seen]]]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for read in parquet.iter_batches(rows, columns=columns):
                images = read.column("image").field("bytes").to_pylist() if needs else []
                chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
                waiting.append((read, images, [pool.submit(_look_at, chunk, viewers) for chunk in chunks]))
                if len(waiting) > AHEAD:
                    yield _assemble(*waiting.popleft(), viewers)
            while waiting:
                yield _assemble(*waiting.popleft(), viewers)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _look_at(images: Sequence[bytes | None], viewers: Sequence["Signal"]) -> list[_Seen]:
    """Open, decode and view images, each step for all of them: code that stays in the processor's cache runs faster."""
    seen = [_open(data) for data in images]
    for group in _groups(seen):
        _decode_and_view(group, viewers)
    return seen


def _open(data: bytes | None) -> _Seen:
    seen = _Seen()
    if data is not None:
        try:
            encoded = EncodedImage(data)
            seen.header = encoded.header
            seen.encoded = encoded
        except Exception as error:  # Pillow and the libraries under it raise nearly anything
            seen.error = error
    return seen


def _groups(seen: Sequence[_Seen]) -> Iterator[list[_Seen]]:
    """Yield the images that could be opened, as many at a time as `GROUP_PIXELS` allows but at least one."""
    group: list[_Seen] = []
    for one in seen:
        if one.encoded is None:
            continue
        if group and sum(other.bytes_decoded for other in group) + one.bytes_decoded > 3 * GROUP_PIXELS:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _decode_and_view(group: Sequence[_Seen], viewers: Sequence["Signal"]) -> None:
    memory = _memory_for(group)
    decoded = []
    for one in group:
        encoded, one.encoded = one.encoded, None
        if encoded is None or not viewers:
            continue
        try:
            decoded.append((one, encoded.decode(memory[: one.bytes_decoded])))
        except Exception as error:  # as above
            one.error = error
        memory = memory[one.bytes_decoded :]
    for viewer in viewers:
        for one, pixels in decoded:
            one.views.append(viewer.view(pixels))


class _Memory(threading.local):
    """What a thread decodes into, again and again: fresh pages would cost about as much as half the decoding."""

    kept = np.empty(0, np.uint8)


_memory = _Memory()


def _memory_for(group: Sequence[_Seen]) -> npt.NDArray[np.uint8]:
    wanted = sum(one.bytes_decoded for one in group)
    if wanted > 3 * GROUP_PIXELS:
        return np.empty(wanted, np.uint8)
    if _memory.kept.size == 0:
        _memory.kept = np.empty(3 * GROUP_PIXELS, np.uint8)
    return _memory.kept


def _assemble(
    read: pa.RecordBatch,
    images: list[bytes | None],
    futures: Sequence[Future[list[_Seen]]],
    viewers: Sequence["Signal"],
) -> ReadBatch:
    seen = [one for future in futures for one in future.result()]
    views = {viewer: [one.views[i] if one.views else None for one in seen] for i, viewer in enumerate(viewers)}
    return ReadBatch(
        sample_ids=read.column("sample_id"),
        captions=read.column("caption"),
        images=images,
        headers=[one.header for one in seen],
        views=views,
        errors={row: one.error for row, one in enumerate(seen) if one.error is not None},
    )
