"""What a child process of `process.run_child` tells its parent beside its result: how far it is, and how it ended."""

import json
from collections.abc import Mapping
from typing import Any

REPORT = "\x1e"
"""Begins a line of JSON among lines of text, as in RFC 7464."""


class Stopped(BaseException):
    """Raised in a child that was asked to stop, once it has saved what it goes on from; the message says from where.

    Like `KeyboardInterrupt` it is no `Exception`, so that no library takes it for a failure to recover from.
    """


class StartAgain(RuntimeError):  # noqa: N818 - says what to do
    """Raised in one of several children if it can't go on, but all can when they are started again; says why."""


def report(values: Mapping[str, Any]) -> None:
    """Send a JSON object to the parent's `on_report`."""
    print(REPORT + json.dumps(values), flush=True)  # noqa: T201 - the parent reads what is printed
