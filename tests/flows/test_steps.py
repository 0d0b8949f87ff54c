import time
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import FlowRunFilter
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from flows.steps import MAX_TASK_RUNS, MIN_GROUP_SAMPLES, artifact_key, grouped, step, taken, task_runner, together
from storage.refs import Outcome, ShardRef
from storage.warehouse import check_name


@step(task_run_name="double {number}")
def double(number: int) -> Outcome[int]:
    """Double a number; even ones are known already."""
    return Outcome(2 * number, cached=number % 2 == 0)


@flow
def doubles() -> dict[str, list[int]]:
    futures = [double.submit(n) for n in range(4)]
    return {"submitted": [f.result() for f in futures], "called": [taken(double(n)) for n in range(4)]}


def shards(*rows: int) -> list[ShardRef]:
    return [ShardRef("p", f"{i:04}", n) for i, n in enumerate(rows)]


def test_a_step_gives_its_reference_whether_cached_or_not() -> None:
    assert doubles() == {"submitted": [0, 2, 4, 6], "called": [0, 2, 4, 6]}


def test_outcomes_together_are_cached_if_all_are() -> None:
    assert together([Outcome(1, True), Outcome(2, True)]) == Outcome([1, 2], True)
    assert together([Outcome(1, True), Outcome(2, False)]) == Outcome([1, 2], False)


def recorded(flow_run_id: UUID) -> dict[str, str]:
    """Names and states of a flow run's task runs, which the server records a moment after they end."""
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [flow_run_id]}))
    return {run.name: run.state_name for run in runs}


def test_what_the_warehouse_held_shows_as_cached_in_prefect() -> None:
    state = doubles(return_state=True)
    expected = {"double 0": "Cached", "double 1": "Completed", "double 2": "Cached", "double 3": "Completed"}
    deadline = time.monotonic() + 60
    while (found := recorded(state.state_details.flow_run_id)) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found == expected


@pytest.mark.parametrize(("error", "attempts"), [(OSError("disk away"), 3), (ValueError("not an image column"), 1)])
def test_only_what_may_pass_is_tried_again(error: Exception, attempts: int) -> None:
    tried = []

    @step(retries=2)
    def fail() -> Outcome[None]:
        tried.append(1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        flow(lambda: fail.submit().result(), name="failing")()
    assert len(tried) == attempts


@pytest.mark.parametrize("name", ["pets", "my_pets.v2", "a" * 64, "0-_.0"])
def test_every_name_of_a_dataset_makes_a_key_that_prefect_takes(name: str) -> None:
    assert ArtifactCreate(key=artifact_key("funnel", check_name(name, "dataset"))).key.startswith("funnel-")


def test_small_shards_share_a_task_run_and_order_is_kept() -> None:
    many = shards(*[250] * 10)
    groups = grouped(many)
    assert [len(g) for g in groups] == [4, 4, 2]
    assert [s for g in groups for s in g] == many


def test_a_huge_pool_stays_below_the_limit_of_task_runs() -> None:
    groups = grouped(shards(*[MIN_GROUP_SAMPLES] * 5_000))
    assert len(groups) <= MAX_TASK_RUNS
    assert sum(len(g) for g in groups) == 5_000


def test_no_shards_make_no_groups() -> None:
    assert grouped([]) == []


@pytest.mark.parametrize(
    ("kind", "workers", "expected"), [("threads", "3", ThreadPoolTaskRunner), ("processes", "2", ProcessPoolTaskRunner)]
)
def test_one_setting_chooses_the_runner(
    monkeypatch: pytest.MonkeyPatch, kind: str, workers: str, expected: type
) -> None:
    monkeypatch.setenv("TAMIS_RUNNER", kind)
    monkeypatch.setenv("TAMIS_WORKERS", workers)
    assert isinstance(task_runner(), expected)


@pytest.mark.parametrize(("kind", "workers"), [("ray?", "1"), ("threads", "0"), ("threads", "many")])
def test_a_wrong_runner_setting_says_what_is_possible(monkeypatch: pytest.MonkeyPatch, kind: str, workers: str) -> None:
    monkeypatch.setenv("TAMIS_RUNNER", kind)
    monkeypatch.setenv("TAMIS_WORKERS", workers)
    with pytest.raises(ValueError, match="threads, processes"):
        task_runner()
