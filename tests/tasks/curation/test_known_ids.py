import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.warehouse import Warehouse
from tasks.curation import known_ids
from tasks.curation.known_ids import KnownIds


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path / "warehouse"))


def write(warehouse: Warehouse, name: str, ids: list[str]) -> None:
    warehouse.write_table(f"pools/p/{name}.parquet", pa.table({"sample_id": ids, "caption": ids}))


def ids(count: int, salt: str = "") -> list[str]:
    return [hashlib.sha256(f"{salt}{i}".encode()).hexdigest()[:32] for i in range(count)]


def test_an_empty_folder_knows_nothing(warehouse: Warehouse) -> None:
    known = KnownIds(warehouse, "pools/p", "sample_id")
    known.refresh()
    assert len(known) == 0
    assert ids(1)[0] not in known


def test_ids_of_all_tables_are_known_and_no_others(warehouse: Warehouse) -> None:
    write(warehouse, "a", ids(500)[:250])
    write(warehouse, "b", ids(500)[250:])
    known = KnownIds(warehouse, "pools/p", "sample_id")
    known.refresh()
    assert len(known) == 500
    assert all(identifier in known for identifier in ids(500))
    assert not any(identifier in known for identifier in ids(500, "other"))


def test_refresh_reads_only_tables_that_are_new(warehouse: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    write(warehouse, "a", ids(3, "a"))
    known = KnownIds(warehouse, "pools/p", "sample_id")
    known.refresh()
    write(warehouse, "b", ids(3, "b"))
    write(warehouse, "c", ids(3, "c"))
    known.add("c.parquet", ids(3, "c"))
    read: list[str] = []
    read_table = Warehouse.read_table
    monkeypatch.setattr(
        Warehouse, "read_table", lambda self, path, columns: (read.append(path), read_table(self, path, columns))[1]
    )
    known.refresh()
    assert read == ["pools/p/b.parquet"]
    assert all(identifier in known for salt in "abc" for identifier in ids(3, salt))


def test_ids_of_deleted_tables_are_forgotten(warehouse: Warehouse) -> None:
    write(warehouse, "a", ids(3, "a"))
    write(warehouse, "b", ids(3, "b"))
    known = KnownIds(warehouse, "pools/p", "sample_id")
    known.refresh()
    warehouse.local_path("pools/p/a.parquet").unlink()
    known.refresh()
    assert [identifier in known for identifier in (ids(1, "a")[0], ids(1, "b")[0])] == [False, True]


@given(st.lists(st.binary(min_size=16, max_size=16)), st.lists(st.binary(min_size=16, max_size=16)))
def test_it_is_a_set(present: list[bytes], asked: list[bytes]) -> None:
    ends_in_zeros = [digest[:12] + bytes(4) for digest in present]
    known = KnownIds(Warehouse("nowhere"), "pools/p", "sample_id")
    known._compact([])
    known.add("a.parquet", [digest.hex() for digest in present[::2] + ends_in_zeros])
    known._compact([])
    known.add("b.parquet", [digest.hex() for digest in present[1::2]])
    expected = {*present, *ends_in_zeros}
    assert all((digest.hex() in known) == (digest in expected) for digest in [*asked, *present, *ends_in_zeros])


def test_many_new_ids_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_ids, "COMPACT_AFTER", 10)
    known = KnownIds(Warehouse("nowhere"), "pools/p", "sample_id")
    for i in range(10):
        known.add(f"{i}.parquet", ids(4, str(i)))
    assert len(known._recent) <= 10
    assert len(known) == 40
    assert all(identifier in known for i in range(10) for identifier in ids(4, str(i)))
