"""How the suite is spread over workers, and the S3 server that some of it needs."""

import gc
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

GROUPS = {
    "system": ("tests/system/",),
    "trained": ("tests/tasks/training/test_fit.py", "tests/tasks/adapters/", "tests/tasks/evaluation/test_generate.py"),
    "flows": ("tests/flows/",),
}
"""Files that share a fixture which takes long to set up, and so run on one worker; others are a group each."""

FIRST = (
    *GROUPS,
    "tests/tasks/training/test_distributed.py",
    "tests/tasks/training/test_batches.py",
    "tests/tasks/training/preflight/test_learning.py",
    "tests/tasks/curation/test_decide_oracle.py",
    "tests/tasks/sample_models/test_gemma.py",
    "tests/tasks/curation/test_decontaminate.py",
)
"""What takes longest, from the longest on; begun last, it would end with one worker busy and the others idle."""


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0]
    return next((name for name, files in GROUPS.items() if file.startswith(files)), file)


class ByGroup(LoadScopeScheduling):
    """Gives each group to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest groups."""
    places = {group: at for at, group in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(group_of(item.nodeid), len(FIRST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all tests without looking for garbage meanwhile: there is none among the modules of torch."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that speaks S3."""
    from moto.server import ThreadedMotoServer  # takes a second, and few tests need it

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of an empty bucket; clients find the server by their environment."""
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"b{abs(hash(request.node.nodeid)):x}"
    s3fs.S3FileSystem().mkdir(bucket)
    return bucket
