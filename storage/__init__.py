"""Where results live: paths, atomic writes, schemas, snapshots and the DuckDB catalog."""
