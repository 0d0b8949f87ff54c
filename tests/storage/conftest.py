from pathlib import Path

import pytest

from storage.warehouse import Warehouse


@pytest.fixture
def s3_warehouse(bucket: str) -> Warehouse:
    return Warehouse(f"s3://{bucket}/tamis")


@pytest.fixture(params=["local", "s3"])
def warehouse(request: pytest.FixtureRequest, tmp_path: Path) -> Warehouse:
    if request.param == "local":
        return Warehouse(str(tmp_path / "warehouse"))
    return request.getfixturevalue("s3_warehouse")
