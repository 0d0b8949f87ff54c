"""The ids that a pool's tables hold already, 16 bytes of memory each, so that nothing is added twice."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from storage.warehouse import Warehouse

COMPACT_AFTER = 2**18
READERS = 8

Digests = npt.NDArray[np.bytes_]


class KnownIds:
    """Ids (32 hex digits) in one column of all Parquet tables of a folder; `refresh` reads tables that are new.

    Threads may share one.
    """

    def __init__(self, warehouse: Warehouse, folder: str, column: str) -> None:
        self.warehouse, self.folder, self.column = warehouse, folder, column
        self._tables: set[str] = set()
        self._sorted: Digests = np.empty(0, "S16")
        self._recent: set[bytes] = set()
        self._lock = threading.RLock()

    def __contains__(self, identifier: str) -> bool:
        digest = bytes.fromhex(identifier)
        with self._lock:
            if digest in self._recent:
                return True
            if not len(self._sorted):
                return False
            place = int(np.searchsorted(self._sorted, np.bytes_(digest)))
            # numpy drops zero bytes at the end of fixed-width values
            return place < len(self._sorted) and self._sorted[place] == digest.rstrip(b"\0")

    def __len__(self) -> int:
        with self._lock:
            return len(self._sorted) + len(self._recent)

    def refresh(self) -> None:
        """Read the ids of tables that appeared since the last call; read all again if some were deleted."""
        with self._lock:
            present = set(self.warehouse.names(self.folder))
            if self._tables - present:
                self._tables, self._sorted, self._recent = set(), np.empty(0, "S16"), set()
            if new := sorted(present - self._tables):
                with ThreadPoolExecutor(min(READERS, len(new))) as threads:
                    self._compact(threads.map(self._read, new))
                self._tables.update(new)

    def add(self, table: str, identifiers: Iterable[str]) -> None:
        """Note that the caller wrote `table`, with these ids, so that `refresh` need not read it."""
        with self._lock:
            self._tables.add(table)
            self._recent.update(map(bytes.fromhex, identifiers))
            if len(self._recent) > COMPACT_AFTER:
                self._compact([])

    def _read(self, name: str) -> Digests:
        table = self.warehouse.read_table(f"{self.folder}/{name}", [self.column])
        return np.frombuffer(bytes.fromhex("".join(table.column(0).to_pylist())), "S16")

    def _compact(self, parts: Iterable[Digests]) -> None:
        recent = np.frombuffer(b"".join(self._recent), "S16")
        self._sorted = np.sort(np.concatenate([self._sorted, recent, *parts]))
        self._recent.clear()
