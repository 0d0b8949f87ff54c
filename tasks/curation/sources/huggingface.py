"""Hugging Face `datasets`: a dataset saved with `save_to_disk`, or one by its name on the hub or in the cache."""

from collections.abc import Iterator
from typing import cast

import datasets

from tasks.curation.sources.arrow_rows import BATCH_ROWS, batch_rows
from tasks.curation.sources.columns import arrow_kinds, choose_columns
from tasks.curation.sources.contract import Layout, Row, SourceError, SourceFile
from tasks.curation.sources.files import ImageFolder

HUB = "hf://datasets/"


def find_named_dataset(name: str, layout: Layout) -> list[SourceFile]:
    """Return one source file per split of a dataset that `datasets.load_dataset` finds by name.

    Downloads it into the `datasets` cache if it is not there. Raises `SourceError` if it can't.
    """
    splits = cast(datasets.DatasetDict, _load(name, None))
    return [
        SourceFile(f"{HUB}{name}/{split}", "huggingface", part.num_rows, part._fingerprint, layout)
        for split, part in splits.items()
    ]


def read_huggingface(file: SourceFile) -> Iterator[Row]:
    """Yield one split's rows in order, from memory-mapped Arrow files. Images are not decoded."""
    dataset = _open(file.uri)
    columns = choose_columns(arrow_kinds(dataset.features.arrow_schema), file.layout, file.uri)
    images = ImageFolder(file.layout.image_folder or file.uri)
    row = 0
    for table in dataset.with_format("arrow").iter(batch_size=BATCH_ROWS):
        for batch in table.to_batches():
            yield from batch_rows(batch, columns, images, row)
            row += batch.num_rows


def _open(uri: str) -> datasets.Dataset:
    if not uri.startswith(HUB):
        return cast(datasets.Dataset, datasets.load_from_disk(uri))
    name, split = uri.removeprefix(HUB).rsplit("/", 1)
    return cast(datasets.Dataset, _load(name, split))


def _load(name: str, split: str | None) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return cast("datasets.Dataset | datasets.DatasetDict", datasets.load_dataset(name, split=split))
    except Exception as error:  # `datasets`, its HTTP client and its builders share no base class
        raise SourceError(
            f"{name}: datasets.load_dataset can't load it here ({type(error).__name__}: {error}). Without network, "
            f"run load_dataset({name!r}).save_to_disk(folder) where there is one, copy the folder and give its path."
        ) from error
