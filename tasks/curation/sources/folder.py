"""A folder of images, each beside a text file or JSON file of the same name with its caption."""

from collections.abc import Iterator

from tasks.curation.sources.contract import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Row, RowError, SourceFile
from tasks.curation.sources.files import ImageFolder, read_ahead
from tasks.curation.sources.grouping import Member, group_members, role


def read_folder(file: SourceFile, names: list[str]) -> Iterator[Row]:
    """Yield the samples of a folder; `names` are its files, sorted, relative to it."""
    folder = ImageFolder(file.uri)

    def read(name: str) -> Member:
        limit = MAX_IMAGE_BYTES if role(name) == "image" else MAX_TEXT_BYTES
        try:
            return Member(name, folder.read(name, limit))
        except RowError as error:
            return Member(name, error)

    yield from group_members(read_ahead((name for name in names if role(name)), read, source=file.uri))
