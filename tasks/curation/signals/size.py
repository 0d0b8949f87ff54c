"""Size and format of images, from their headers alone."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from storage.schema import column
from tasks.curation.batch import Batch, Needs
from tasks.curation.signals.contract import Signal


@dataclass(frozen=True)
class Size(Signal):
    """Width, height, format and file size; nothing is decoded. Rules on them: DataComp `basic_filter`, LAION."""

    name = "size"
    version = 1
    needs = Needs.HEADER
    columns = pa.schema(
        [
            column("width", pa.int32(), "pixels, after Exif orientation; null if the header can't be read"),
            column("height", pa.int32(), "pixels, after Exif orientation"),
            column("aspect", pa.float32(), "longer side divided by shorter side, 1 or more"),
            column("format", pa.string(), "jpeg, png, webp, gif, …: Pillow's name in lower case"),
            column("file_bytes", pa.int64(), "size of the image file, bytes"),
            column("frames", pa.int32(), "1, or the frames of an animation or pages of a TIFF"),
        ]
    )

    def measure(self, batch: Batch) -> pa.RecordBatch:
        """See `Signal.measure`."""
        width = pa.array([h and h.width for h in batch.headers], pa.int32())
        height = pa.array([h and h.height for h in batch.headers], pa.int32())
        long = pc.max_element_wise(width, height, skip_nulls=False).cast(pa.float64())
        short = pc.min_element_wise(width, height, skip_nulls=False).cast(pa.float64())
        return pa.record_batch(
            [
                width,
                height,
                pc.divide(long, short).cast(pa.float32()),
                pa.array([h and h.format for h in batch.headers], pa.string()),
                pa.array([None if data is None else len(data) for data in batch.images], pa.int64()),
                pa.array([h and h.frames for h in batch.headers], pa.int32()),
            ],
            schema=self.columns,
        )
