"""What is known of a training whose loss became infinite or not a number, kept so that it is not repeated in vain."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

_FILE = "diverged.json"


class Diverged(RuntimeError):  # noqa: N818 - says what happened
    """A loss or gradient is infinite or not a number; the message names the step and the samples it was computed on."""

    def __init__(self, what: str, *, step: int, sample_ids: Sequence[str]) -> None:
        super().__init__(
            f"{what} in step {step}, with samples {', '.join(sample_ids)}. Look at these samples, and lower "
            "learning_rate if nothing is wrong with them."
        )


def versions() -> dict[str, str]:
    """Return the versions of what computes a training."""
    return {name: version(name) for name in ("torch", "transformers", "trl", "peft")}


def remember(error: Diverged, folder: Path) -> None:
    """Keep in the training's folder that it ended so, and with which versions."""
    unfinished = folder / f"{_FILE}.unfinished"
    unfinished.write_text(json.dumps({"message": str(error), "versions": versions()}))
    unfinished.replace(folder / _FILE)


def recall(folder: Path) -> str | None:
    """Return the message of the error that going on from `folder` would end with again, or None.

    All that a folder's training depends on is the same each time, save the versions: with others it is worth a try.
    """
    if not (folder / _FILE).exists():
        return None
    known = json.loads((folder / _FILE).read_text())
    if known["versions"] != versions():
        (folder / _FILE).unlink()
        return None
    return str(known["message"])
