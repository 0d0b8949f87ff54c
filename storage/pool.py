"""Pools: which shards of samples exist, read from the warehouse itself."""

from storage.refs import PoolRef, ShardRef
from storage.warehouse import Warehouse, check_name


def read_pool(warehouse: Warehouse, name: str) -> PoolRef:
    """Return the pool as it stands now, its shards ordered by name; a pool nobody has ingested into is empty."""
    check_name(name, "pool")
    shards = []
    for file in warehouse.names(f"pools/{name}"):
        with warehouse.open_parquet(f"pools/{name}/{file}") as parquet:
            shards.append(ShardRef(pool=name, name=file.removesuffix(".parquet"), rows=parquet.metadata.num_rows))
    return PoolRef(name=name, shards=tuple(shards))


def pool_names(warehouse: Warehouse) -> list[str]:
    """Return the names of all pools, sorted."""
    return warehouse.names("pools")
