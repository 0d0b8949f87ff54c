"""A real Prefect server and worker, in processes of their own, on a free port and with a home of their own."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.curation.sample import write_sample
from tasks.curation.sample_truth import SampleTruth
from tests.system.processes import Server, answers, end, wait_until

POOL = "tamis"


@pytest.fixture(scope="package")
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
        wait_until(lambda: answers(f"{url}/api/health"), seconds=120)
        yield running
    finally:
        end(process)


@pytest.fixture(scope="package")
def worker(server: Server) -> Iterator[Server]:
    prefect = str(Path(sys.executable).parent / "prefect")
    process = server.start(prefect, "worker", "start", "--pool", POOL, "--type", "process")
    try:
        wait_until(lambda: answers(f"{server.url}/api/work_pools/{POOL}"), seconds=120)
        server.prefect("deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
        yield server
    finally:
        end(process)


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SampleTruth:
    return write_sample(tmp_path_factory.mktemp("sample") / "source", samples=150)
