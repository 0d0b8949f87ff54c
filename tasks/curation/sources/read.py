"""Reads any source file, whatever its format."""

from collections.abc import Iterator

from tasks.curation.sources.contract import Row, SourceFile
from tasks.curation.sources.find import folder_listing
from tasks.curation.sources.folder import read_folder
from tasks.curation.sources.jsonl import read_jsonl
from tasks.curation.sources.parquet import read_parquet
from tasks.curation.sources.webdataset import read_webdataset


def read_rows(file: SourceFile) -> Iterator[Row]:
    """Yield the file's rows in its own order, which is the same each time the file is."""
    match file.format:
        case "webdataset":
            return read_webdataset(file)
        case "folder":
            return read_folder(file, [name for name, _, _ in folder_listing(file.uri)])
        case "parquet":
            return read_parquet(file)
        case "jsonl":
            return read_jsonl(file)
        case "huggingface":
            from tasks.curation.sources.huggingface import read_huggingface  # datasets takes a second to import

            return read_huggingface(file)
