"""Explain: show everything that is known about one sample."""

from prefect import flow
from prefect.artifacts import create_markdown_artifact

from storage.warehouse import Warehouse
from tasks.curation import explain as explaining
from tasks.curation.report.pictures import thumbnail


@flow(name="explain")
def explain(sample_id: str, warehouse: str = "warehouse") -> str:
    """Say what was measured on a sample, what it is a duplicate of, and what every snapshot decided on it, and why.

    Args:
        sample_id: The sample, as in the catalog's views.
        warehouse: Folder or URL of the warehouse.
    """
    explanation = explaining.explain(sample_id, warehouse=Warehouse(warehouse))
    text = explanation.markdown()
    picture = thumbnail(explanation.image)
    create_markdown_artifact(
        key=f"sample-{sample_id}",
        markdown=f"![the image]({picture})\n\n{text}" if picture else text,
        description=f"Sample {explanation.key}",
    )
    return text
