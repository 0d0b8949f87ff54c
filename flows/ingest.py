"""Ingest: add a source to a pool without deciding anything, such as an evaluation set to decontaminate against."""

from prefect import flow

from flows.curate import ingest_source
from flows.steps import Name, task_runner
from storage.catalog import write_catalog
from storage.refs import PoolRef
from storage.warehouse import Warehouse
from tasks.curation.sources.settings import SourceSettings


@flow(name="ingest", task_runner=task_runner())
def ingest(
    pool: Name,
    source: str,
    warehouse: str = "warehouse",
    source_settings: SourceSettings = SourceSettings(),
) -> PoolRef:
    """Add the new samples of a source to a pool.

    Args:
        pool: Name of the pool.
        source: Where the samples are: a folder, file, glob or URL of WebDataset tars, Parquet, JSONL, or a Hugging
            Face dataset.
        warehouse: Folder or URL of the warehouse.
        source_settings: How the source is read, if that can't be told from it.
    """
    store = Warehouse(warehouse)
    store.check_writable()
    samples = ingest_source(source, pool=pool, warehouse=store, settings=source_settings)
    write_catalog(store)
    return samples
