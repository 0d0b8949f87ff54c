"""A real Prefect server and worker, in processes of their own, on a free port and with a home of their own."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.curation.sample import write_sample
from tasks.curation.sample_truth import SampleTruth
from tests.system.processes import Server, end, healthy, wait_until

POOL = "tamis"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    running = Server(url, environment, tmp_path_factory.mktemp("logs"))
    process = running.start(str(Path(sys.executable).parent / "prefect"), "server", "start")
    try:
        wait_until(lambda: healthy(url), seconds=120)
        yield running
    finally:
        end(process)


@pytest.fixture(scope="session")
def worker(server: Server) -> Iterator[Server]:
    server.prefect("work-pool", "create", POOL, "--type", "process")
    server.prefect("deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    process = server.start(str(Path(sys.executable).parent / "prefect"), "worker", "start", "--pool", POOL)
    yield server
    end(process)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleTruth:
    return write_sample(tmp_path_factory.mktemp("sample") / "source", samples=150)
