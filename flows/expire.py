"""Expire: remove a dataset's old snapshots that no run needs."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.steps import AtLeastOne, Name, artifact_key
from storage import expire as expiring
from storage.warehouse import Warehouse


@flow(name="expire")
def expire(
    dataset: Name, keep: AtLeastOne = 10, dry_run: bool = True, warehouse: str = "warehouse"
) -> expiring.Expired:
    """Remove old snapshots with the files that only they name; those that runs or evaluations used stay.

    Args:
        dataset: Dataset whose snapshots to remove.
        keep: How many of the latest snapshots to keep.
        dry_run: Only say what would be removed.
        warehouse: Folder or URL of the warehouse.
    """
    expired = expiring.expire(Warehouse(warehouse), dataset, keep=keep, dry_run=dry_run)
    numbers = ", ".join(map(str, expired.snapshots)) or "none"
    done = "Would remove" if dry_run else "Removed"
    files = "".join(f"\n- `{path}`" for path in expired.files)
    create_markdown_artifact(
        key=artifact_key("expired", dataset),
        description=f"{done} {len(expired.snapshots)} snapshots of {dataset}",
        markdown=f"{done} snapshots: {numbers}\n\n{done} {len(expired.files)} files\n{files}",
    )
    return expired
