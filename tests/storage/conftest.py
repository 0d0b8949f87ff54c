from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

from storage.warehouse import Warehouse


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_warehouse(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Warehouse:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{abs(hash(request.node.nodeid)):x}"
    s3fs.S3FileSystem().mkdir(bucket)
    return Warehouse(f"s3://{bucket}/tamis")


@pytest.fixture(params=["local", "s3"])
def warehouse(request: pytest.FixtureRequest, tmp_path) -> Warehouse:
    if request.param == "local":
        return Warehouse(str(tmp_path / "warehouse"))
    return request.getfixturevalue("s3_warehouse")
