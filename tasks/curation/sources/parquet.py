"""Parquet files with an image column of bytes, `datasets` structs or paths, as img2dataset and others write them."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.curation.sources.arrow_rows import BATCH_ROWS, batch_rows
from tasks.curation.sources.columns import arrow_kinds, choose_columns
from tasks.curation.sources.contract import Fault, Reason, Row, SourceFile
from tasks.curation.sources.files import ImageFolder, open_binary, parent_folder

BUFFER_BYTES = 2**20


def read_parquet(file: SourceFile) -> Iterator[Row]:
    """Yield the file's rows in order, a few at a time even if it is one huge row group.

    A file that can't be read from some row on ends with one broken_archive fault. Raises `SourceError` if its
    columns can't be told apart.
    """
    images = ImageFolder(file.layout.image_folder or parent_folder(file.uri))
    row = 0
    with open_binary(file.uri) as raw:
        try:
            parquet = pq.ParquetFile(raw, buffer_size=BUFFER_BYTES, pre_buffer=False)
            columns = choose_columns(arrow_kinds(parquet.schema_arrow), file.layout, file.uri)
            for batch in parquet.iter_batches(BATCH_ROWS, use_threads=False):
                yield from batch_rows(batch, columns, images, row)
                row += batch.num_rows
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
                raise  # the disk or the network failed, not the file
            yield Fault(None, f"row {row}", Reason.BROKEN_ARCHIVE, str(error))
