"""The flow on the tiny model that ships with the sample; its child process rehearses on no device."""

import json

from prefect.client.orchestration import get_client

from flows.train import RecipeChanges
from flows.what_fits import what_fits

RECIPE = "deployments/recipes/sample.yaml"


def table(key: str) -> list[dict[str, object]]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts()
    [data] = [artifact.data for artifact in found if artifact.key == key]
    return list(json.loads(str(data)))


def test_a_large_gpu_has_a_layout_for_every_bound_on_image_tokens() -> None:
    rows = what_fits(recipe=RECIPE, changes=RecipeChanges(batch_size=4), gpu_gib=80)
    assert [row["max_image_tokens"] for row in rows] == [70, 140, 280, 560, 1120]
    assert {(row["batch_size"], row["accumulation"], row["checkpointed_share"]) for row in rows} == {(4, 1, 0.0)}
    assert table("what-fits-80-gib") == rows
