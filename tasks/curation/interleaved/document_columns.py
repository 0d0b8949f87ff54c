"""What document conditions look at: counts of a document's segments, and its text's signals."""

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from storage.schema import DOCUMENT_DECISIONS

COUNTS = pa.schema([DOCUMENT_DECISIONS.field(at) for at in range(6, len(DOCUMENT_DECISIONS))])

_COUNTS = """
    SELECT document_id,
           count(*) FILTER (kind = 'text') AS texts,
           count(*) FILTER (kind = 'image') AS images,
           count(*) FILTER (kind = 'image' AND sample_id IS NULL) AS missing_images,
           missing_images / greatest(images, 1) AS missing_share,
           count(*) FILTER (kind = 'text' AND kept) AS kept_texts,
           count(*) FILTER (kind = 'image' AND kept) AS kept_images
    FROM nodes GROUP BY document_id
"""


def document_columns(documents: pa.Table, nodes: pa.Table, whole: pa.Table) -> pa.Table:
    """Return a row a document, in order: its own columns, `COUNTS` of its segments, and the signals in `whole`.

    `nodes` are rows of `NODE_DECISIONS`; `whole` is what `measure_whole` gives.
    """
    with duckdb.connect() as connection:
        connection.register("nodes", nodes)
        counted = connection.sql(_COUNTS).to_arrow_table().combine_chunks()
    table = documents.select(["document_id", "key", "text_digest", "metadata"])
    counted = counted.take(pc.index_in(table["document_id"], value_set=pa.array(counted["document_id"].to_pylist())))
    for field in COUNTS:
        table = table.append_column(field, counted[field.name].cast(field.type))
    for field in list(whole.schema)[1:]:
        table = table.append_column(field, whole[field.name])
    return table
