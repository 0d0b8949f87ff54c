"""How the suite is spread over workers, and the S3 server that some of it needs."""

import gc
from collections.abc import Generator, Iterator

import pytest

SHARED = ("server", "trained", "prefect_server")
"""Fixtures that take long to set up: all files that use one of them run on one worker, so that there is only one."""

FIRST = (
    *SHARED,
    *("training/test_distributed.py", "training/test_batches.py", "preflight/test_learning.py"),
    *("curation/test_decide_oracle.py", "sample_models/test_gemma.py", "curation/test_decontaminate.py"),
)
"""What takes longest, from the longest on; begun last, it would end with one worker busy and the others idle."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import all tests without looking for garbage meanwhile: there is none among the modules of torch."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of each test, for `--dist loadgroup`, and begin with the longest groups."""
    used: dict[str, set[str]] = {}
    for item in items:
        used.setdefault(file_of(item), set()).update(getattr(item, "fixturenames", ()))
    groups = {file: next((name for name in SHARED if name in names), file) for file, names in used.items()}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(groups[file_of(item)]))
    items.sort(key=lambda item: place(groups[file_of(item)]))


def file_of(item: pytest.Item) -> str:
    return item.nodeid.partition("::")[0].removeprefix("tests/")


def place(group: str) -> int:
    return next((at for at, name in enumerate(FIRST) if group.endswith(name)), len(FIRST))


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
