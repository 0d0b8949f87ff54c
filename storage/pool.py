"""Pools: which shards of samples exist, read from the warehouse itself."""

from storage.refs import DocumentShardRef, DocumentsRef, PoolRef, ShardRef
from storage.warehouse import Warehouse, check_name


def read_pool(warehouse: Warehouse, name: str) -> PoolRef:
    """Return the pool as it stands now, its shards ordered by name; a pool nobody has ingested into is empty."""
    check_name(name, "pool")
    shards = []
    for file in warehouse.names(f"pools/{name}"):
        with warehouse.open_parquet(f"pools/{name}/{file}") as parquet:
            shards.append(ShardRef(pool=name, name=file.removesuffix(".parquet"), rows=parquet.metadata.num_rows))
    return PoolRef(name=name, shards=tuple(shards))


def read_documents(warehouse: Warehouse, name: str) -> DocumentsRef:
    """Return the documents of a pool as they stand now, shards ordered by name, with the shards of their images.

    Shards of samples that belong to no documents, such as those of a killed ingest, are left out.
    """
    check_name(name, "pool")
    shards = []
    for file in warehouse.names(f"documents/{name}"):
        with warehouse.open_parquet(f"documents/{name}/{file}") as parquet:
            shards.append(DocumentShardRef(name, file.removesuffix(".parquet"), parquet.metadata.num_rows))
    named = {shard.name for shard in shards}
    images = tuple(shard for shard in read_pool(warehouse, name).shards if shard.name in named)
    return DocumentsRef(tuple(shards), PoolRef(name, images))


def pool_names(warehouse: Warehouse) -> list[str]:
    """Return the names of all pools, sorted."""
    return warehouse.names("pools")
