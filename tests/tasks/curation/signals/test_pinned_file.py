import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import huggingface_hub
import pytest

from tasks.curation.signals.contract import MissingWeights
from tasks.curation.signals.pinned_file import PinnedFile

CONTENT = b"numbers"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "head.pth").write_bytes(CONTENT)
    return tmp_path / "served" / "head.pth"


@pytest.fixture
def server(file: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(file.parent))) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_local_file_of_the_right_checksum_is_used_where_it_lies(file: Path) -> None:
    assert PinnedFile(file=str(file), sha256=DIGEST).path() == file


def test_another_file_is_refused_with_both_checksums(file: Path) -> None:
    with pytest.raises(MissingWeights, match=rf"its sha256 is {DIGEST}, not {'0' * 64}"):
        PinnedFile(file=str(file), sha256="0" * 64).path()


def test_a_file_that_changes_after_the_first_look_is_refused(file: Path) -> None:
    pinned = PinnedFile(file=str(file), sha256=DIGEST)
    pinned.path()
    file.write_bytes(b"others")
    with pytest.raises(MissingWeights, match="its sha256 is"):
        pinned.path()


def test_a_missing_file_is_named_in_full(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=rf"there is no file {tmp_path}/none.pth"):
        PinnedFile(file=f"{tmp_path}/none.pth", sha256=DIGEST).path()


def test_a_url_is_downloaded_once(file: Path, server: str) -> None:
    pinned = PinnedFile(file=f"{server}/head.pth", sha256=DIGEST)
    assert pinned.path().read_bytes() == CONTENT
    file.unlink()
    assert pinned.path().read_bytes() == CONTENT


def test_a_download_of_another_checksum_leaves_nothing_behind(file: Path, server: str, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match="its sha256 is"):
        PinnedFile(file=f"{server}/head.pth", sha256="0" * 64).path()
    assert not any((tmp_path / "cache" / "tamis" / "files").iterdir())


def test_a_url_that_does_not_answer_says_what_to_do(file: Path, server: str) -> None:
    with pytest.raises(MissingWeights, match="Fetch it where there is a network and give the file's path"):
        PinnedFile(file=f"{server}/other.pth", sha256=DIGEST).path()


def test_a_file_of_a_hub_repository_is_asked_for_by_its_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: asked.append(names) or str(file))
    assert PinnedFile(file="hf://owner/name/heads/head.pth", sha256=DIGEST).path() == file
    assert asked == [("owner/name", "heads/head.pth")]


def test_a_hub_that_does_not_answer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(MissingWeights, match="can't be downloaded: no network"):
        PinnedFile(file="hf://owner/name/head.pth", sha256=DIGEST).path()


def test_a_hub_address_without_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="hf://owner/name/path"):
        PinnedFile(file="hf://owner/name", sha256=DIGEST).path()
