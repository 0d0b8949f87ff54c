"""Shows how far a training is while it runs: a progress bar and a page in the UI, both updated in place."""

import time
from collections.abc import Sequence
from uuid import UUID

from httpx import HTTPError
from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from storage.refs import SnapshotRef
from tasks.training.fit import Progress

UPDATE_SECONDS = 10.0
BARS = "▁▂▃▄▅▆▇█"
COLUMNS = 60


class LiveProgress:
    """Call it with a training's progress, in the task that trains; it writes at most every `UPDATE_SECONDS`.

    A server that does not answer costs the picture, not the training.
    """

    def __init__(self, snapshot: SnapshotRef) -> None:
        self.snapshot = snapshot
        self.losses: list[float] = []
        self.shown: tuple[UUID, UUID] | None = None
        self.next = 0.0

    def __call__(self, progress: Progress) -> None:
        """Take note of the progress, and show it if it is time."""
        self.losses.append(progress.loss)
        if time.monotonic() < self.next and progress.step < progress.steps:
            return
        self.next = time.monotonic() + UPDATE_SECONDS
        try:
            self._show(progress)
        except HTTPError as error:
            get_run_logger().warning("the training's progress can't be shown: %s", error)

    def _show(self, progress: Progress) -> None:
        share = 100 * progress.step / progress.steps
        markdown = page(progress, self.losses)
        if self.shown is None:
            title = f"Training on {self.snapshot}"
            bar = create_progress_artifact(share, key=f"progress-{progress.run_id}", description=title)
            text = create_markdown_artifact(markdown, key=f"live-{progress.run_id}", description=title)
            self.shown = (bar, text)
            return
        bar, text = self.shown
        update_progress_artifact(bar, share)
        with get_client(sync_client=True) as client:
            client.update_artifact(text, ArtifactUpdate(data=markdown))


def page(progress: Progress, losses: Sequence[float]) -> str:
    """Return the page of a training whose losses so far were these."""
    return "\n".join(
        [
            f"# Run {progress.run_id}: step {progress.step} of {progress.steps}",
            "| | |",
            "|---|---|",
            f"| loss | {progress.loss:.4f} |",
            f"| token accuracy | {progress.token_accuracy:.3f} |",
            f"| learning rate | {progress.learning_rate:.3g} |",
            f"| throughput | {progress.tokens_per_second:,.0f} tokens/s, {progress.samples_per_second:.2f} samples/s |",
            f"| waiting for input | {progress.input_wait_share:.1%} of the time |",
            f"| peak memory | {progress.peak_memory_bytes / 2**30:.1f} GiB |",
            f"| time left | {progress.seconds_left / 60:.0f} min |",
            "",
            f"Loss so far: `{spark(losses)}` between {min(losses):.4f} and {max(losses):.4f}",
        ]
    )


def spark(values: Sequence[float]) -> str:
    """Return a line of bars, one a value, or one a stretch of values if there are more than `COLUMNS`: their means."""
    count = min(len(values), COLUMNS)
    stretches = [values[at * len(values) // count : (at + 1) * len(values) // count] for at in range(count)]
    means = [sum(stretch) / len(stretch) for stretch in stretches]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)
