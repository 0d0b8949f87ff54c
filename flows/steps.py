"""How a step of `tasks/` appears in Prefect: its cached results as state Cached, its workers as one setting."""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.states import Completed, State
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from pydantic import Field

from storage.refs import Outcome, ShardRef

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
"""What a dataset or a pool may be called."""

AtLeastOne = Annotated[int, Field(ge=1)]
"""A count, or a snapshot's number."""

RUNNERS = {"threads": ThreadPoolTaskRunner, "processes": ProcessPoolTaskRunner}
MAX_TASK_RUNS = 400
"""Most task runs of one kind in a flow run; a Prefect server silently drops some beyond about a thousand."""
MIN_GROUP_SAMPLES = 1_000
"""Least samples worth a task run of their own: about 5 s of scoring on two cores."""


def step(**options: Any) -> Callable[[Callable[P, Outcome[R]]], Task[P, Any]]:
    """Make a Prefect task of a function that returns an `Outcome`; one found in the warehouse shows as Cached.

    `options` are those of `prefect.task`. Nothing is kept in Prefect's own result store: the warehouse is the cache.
    Retries leave out what can't pass: input that is wrong stays wrong.
    """

    def decorate(function: Callable[P, Outcome[R]]) -> Task[P, Any]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Any:
            outcome = function(*args, **kwargs)
            if outcome.cached:
                return Completed(name="Cached", message="The warehouse already held it", data=outcome.ref)
            return outcome.ref

        return task(run, persist_result=False, retry_condition_fn=_may_pass, **options)

    return decorate


def _may_pass(_task: Any, _run: Any, failed: State) -> bool:
    return not isinstance(failed.result(raise_on_failure=False), ValueError)


def together(outcomes: Iterable[Outcome[R]]) -> Outcome[list[R]]:
    """Return many outcomes as one, which is cached if they all are."""
    found = list(outcomes)
    return Outcome([outcome.ref for outcome in found], cached=all(outcome.cached for outcome in found))


def taken(result: Any) -> Any:
    """Return what a directly called step gives, whether it came fresh or as a Cached state."""
    return result.result() if isinstance(result, State) else result


def artifact_key(kind: str, name: str) -> str:
    """Return a key for an artifact about a pool or dataset: Prefect takes no dots and underscores there."""
    return f"{kind}-{name}".replace(".", "-").replace("_", "-")


def task_runner() -> TaskRunner[Any]:
    """Return the runner that `TAMIS_RUNNER` (threads, processes) and `TAMIS_WORKERS` (a number) ask for.

    The default, one thread, suits steps that use all cores of a machine by themselves.
    """
    kind = os.environ.get("TAMIS_RUNNER", "threads")
    workers = os.environ.get("TAMIS_WORKERS", "1")
    if kind not in RUNNERS or not workers.isdecimal() or int(workers) < 1:
        raise ValueError(
            f"TAMIS_RUNNER={kind} TAMIS_WORKERS={workers}: use one of {', '.join(RUNNERS)} and a number of at least 1."
        )
    return RUNNERS[kind](max_workers=int(workers))


def in_groups(items: Sequence[T], at_most: int = MAX_TASK_RUNS) -> list[tuple[T, ...]]:
    """Cut items into as many groups as task runs are allowed, in order."""
    size = max(1, -(-len(items) // at_most))
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def grouped(shards: Sequence[ShardRef]) -> list[tuple[ShardRef, ...]]:
    """Cut shards into groups worth a task run each: enough samples to pay for it, and not too many groups."""
    wanted = max(MIN_GROUP_SAMPLES, sum(shard.rows for shard in shards) // MAX_TASK_RUNS + 1)
    groups: list[list[ShardRef]] = []
    rows = wanted
    for shard in shards:
        if rows >= wanted:
            groups.append([])
            rows = 0
        groups[-1].append(shard)
        rows += shard.rows
    return [tuple(group) for group in groups]
