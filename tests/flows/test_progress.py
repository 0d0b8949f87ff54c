"""What a training shows of itself while it runs."""

from dataclasses import replace

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows import progress as showing
from flows.progress import COLUMNS, LiveProgress, spark
from storage.refs import SnapshotRef
from tasks.training.fit import Progress

SNAPSHOT = SnapshotRef("squares", 1)
AT_ONE = Progress(
    run_id="0f0f",
    step=1,
    steps=4,
    loss=2.0,
    token_accuracy=0.25,
    learning_rate=1e-3,
    tokens_per_second=1234.4,
    samples_per_second=3.21,
    input_wait_share=0.0312,
    peak_memory_bytes=3 * 2**30,
    seconds_left=150.0,
)


def artifacts(key: str) -> list[object]:
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:
        return [artifact.data for artifact in client.read_artifacts(artifact_filter=wanted)]


@flow
def show(*reports: Progress) -> None:
    live = LiveProgress(SNAPSHOT)
    for report in reports:
        live(report)


def test_the_bar_and_the_page_follow_the_training_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showing, "UPDATE_SECONDS", 0.0)
    show(AT_ONE, replace(AT_ONE, step=3, loss=1.0))
    assert artifacts("progress-0f0f") == [75.0]
    [page] = artifacts("live-0f0f")
    assert "step 3 of 4" in str(page)
    assert "1,234 tokens/s, 3.21 samples/s" in str(page)
    assert "3.1% of the time" in str(page)
    assert "`█▁`" in str(page)


def test_reports_in_quick_succession_are_shown_once_and_the_last_always() -> None:
    reports = [replace(AT_ONE, run_id="1f1f", step=step) for step in (1, 2, 3, 4)]
    show(*reports[:3])
    assert artifacts("progress-1f1f") == [25.0]
    show(*(replace(report, run_id="2f2f") for report in reports))
    assert artifacts("progress-2f2f") == [100.0]


def test_a_server_that_does_not_answer_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(showing, "create_progress_artifact", fail)
    show(AT_ONE, replace(AT_ONE, step=4))


def test_a_line_of_bars_shows_means_of_stretches() -> None:
    assert spark([5.0]) == "▁"
    assert spark([0.0, 7.0, 3.5, 1.0]) == "▁█▅▂"
    assert spark([1.0, 1.0, 0.0, 0.0] * COLUMNS) == spark([0.5] * COLUMNS)
    assert spark([float(at // 4) for at in range(4 * COLUMNS)]) == spark([float(at) for at in range(COLUMNS)])
