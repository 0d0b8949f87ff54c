import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tasks.curation.sources import webdataset
from tasks.curation.sources.contract import Fault, RawSample, Reason, Row, SourceFile
from tests.tasks.curation.source_files import member, pairs, picture, write_members, write_tar

IMAGE = picture(0)


def rows(path: Path) -> list[Row]:
    return list(webdataset.read_webdataset(SourceFile(str(path), "webdataset", path.stat().st_size, "1")))


def brief(found: Sequence[Row]) -> list[tuple[str | None, object]]:
    return [(row.key, row.reason if isinstance(row, Fault) else row.caption) for row in found]


def test_samples_keep_key_bytes_caption_url_and_the_other_fields(tmp_path: Path) -> None:
    samples = pairs(3)
    found = rows(write_tar(tmp_path / "a.tar", samples))
    for row, (key, image, caption) in zip(found, samples, strict=True):
        expected = {"width": 24, "status": "success"}
        name = f"{key}.jpg"
        assert row == RawSample(key, name, image, name, caption.encode(), f"https://example.org/{key}", expected)


def test_the_caption_in_json_is_used_where_there_is_no_text(tmp_path: Path) -> None:
    fields = json.dumps({"caption": "from json"}).encode()
    members = [member("a.jpg", IMAGE), member("a.json", fields), member("b.jpg", IMAGE)]
    members += [member("b.txt", b" \n"), member("b.json", fields)]
    assert brief(rows(write_members(tmp_path / "a.tar", members))) == [("a", "from json"), ("b", "from json")]


def test_a_caption_in_json_that_differs_from_the_text_is_kept_as_metadata(tmp_path: Path) -> None:
    members = [member("a.jpg", IMAGE), member("a.txt", b"short"), member("a.json", b'{"caption": "long"}')]
    (row,) = rows(write_members(tmp_path / "a.tar", members))
    assert isinstance(row, RawSample)
    assert (row.caption, row.metadata) == (b"short", {"caption": "long"})


@pytest.mark.parametrize("name", ["a.JPG", "a.Jpeg", "a.png", "a.PNG", "a.webp", "a.gif"])
def test_image_suffixes_are_known_in_any_case(tmp_path: Path, name: str) -> None:
    found = rows(write_members(tmp_path / "a.tar", [member(name, IMAGE), member("a.TXT", b"x")]))
    assert brief(found) == [("a", b"x")]


def test_compressed_archives_are_read_alike(tmp_path: Path) -> None:
    plain = rows(write_tar(tmp_path / "a.tar", pairs(3)))
    assert rows(write_tar(tmp_path / "a.tar.gz", pairs(3), "w:gz")) == plain


def test_folders_and_dots_belong_to_the_key(tmp_path: Path) -> None:
    names = ["./x/a.jpg", "./x/a.txt", "v1.2/a.jpg", "v1.2/a.txt", "a.1.jpg", "a.2.jpg", "a.1.txt", "a.2.txt"]
    found = rows(write_members(tmp_path / "a.tar", [member(n, IMAGE if n.endswith("g") else b"x") for n in names]))
    assert brief(found) == [("x/a", b"x"), ("v1.2/a", b"x"), ("a.1", b"x"), ("a.2", b"x")]


def test_long_names_are_read(tmp_path: Path) -> None:
    key = "folder/" * 40 + "k" * 90
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=format) as archive:
            for info, data in (member(f"{key}.jpg", IMAGE), member(f"{key}.txt", b"x")):
                archive.addfile(info, io.BytesIO(data))
        assert brief(rows(tmp_path / "a.tar")) == [(key, b"x")]


def test_other_members_are_passed_over(tmp_path: Path) -> None:
    members = [member(".DS_Store", b"?"), member("._a.jpg", b"?"), member("a", type=tarfile.DIRTYPE)]
    members += [member("a.jpg", IMAGE), member("a.npy", b"?"), member("a.txt", b"x")]
    assert brief(rows(write_members(tmp_path / "a.tar", members))) == [("a", b"x")]


def test_a_second_image_of_a_key_is_a_fault(tmp_path: Path) -> None:
    members = [member("a.jpg", IMAGE), member("a.png", picture(1)), member("a.txt", b"x")]
    assert brief(rows(write_members(tmp_path / "a.tar", members))) == [("a", b"x"), ("a", Reason.EXTRA_IMAGE)]


def test_a_key_that_comes_again_is_another_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", pairs(1))
    write_tar(path, [(pairs(1)[0][0], picture(7), "other")], "a")
    assert brief(rows(path)) == [("000000000", b"caption 0"), ("000000000", b"other")]


def test_text_without_an_image_is_a_fault(tmp_path: Path) -> None:
    found = rows(write_members(tmp_path / "a.tar", [member("a.txt", b"x"), member("b.json", b"{}")]))
    assert brief(found) == [("a", Reason.MISSING_IMAGE), ("b", Reason.MISSING_IMAGE)]


@pytest.mark.parametrize("fields", [b"{", b"[]", b"\xff", b"null", b"[" * 100_000])
def test_bad_json_is_a_fault(tmp_path: Path, fields: bytes) -> None:
    members = [member("a.jpg", IMAGE), member("a.txt", b"x"), member("a.json", fields)]
    assert brief(rows(write_members(tmp_path / "a.tar", members))) == [("a", Reason.BAD_JSON)]


def test_names_that_lead_elsewhere_are_only_text(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    keys = ["../secret", str(tmp_path / "secret"), "a/../../secret"]
    members = [m for key in keys for m in (member(f"{key}.jpg", IMAGE), member(f"{key}.txt", b"x"))]
    path = write_members(tmp_path / "a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    found = rows(path)
    assert brief(found) == [(key, b"x") for key in keys]
    assert all(isinstance(row, RawSample) and row.image == IMAGE and row.image_name == "secret.jpg" for row in found)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_faults(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret.jpg").write_bytes(IMAGE)
    link = member("a.jpg", type=kind, linkname=str(tmp_path / "secret.jpg"))
    found = rows(write_members(tmp_path / "a.tar", [link, member("a.txt", b"x"), *[member("b.jpg", IMAGE)]]))
    assert brief(found) == [("a", Reason.NOT_A_FILE), ("b", None)]


def test_members_over_the_limits_are_faults_and_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_IMAGE_BYTES", len(IMAGE))
    monkeypatch.setattr(webdataset, "MAX_TEXT_BYTES", 10)
    members = [member("a.jpg", IMAGE + b"+"), member("a.txt", b"x"), member("b.jpg", IMAGE), member("b.txt", b"x" * 11)]
    found = rows(write_members(tmp_path / "a.tar", [*members, member("c.jpg", IMAGE), member("c.txt", b"x" * 10)]))
    assert brief(found) == [("a", Reason.TOO_LARGE), ("b", Reason.TOO_LARGE), ("c", b"x" * 10)]


def test_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    found = rows(write_members(tmp_path / "a.tar", [member(f"{name}.jpg", IMAGE), member(f"{name}.txt", b"x")]))
    assert brief(found) == [(name, b"x")]


@pytest.mark.parametrize("compressed", [False, True])
def test_of_a_broken_archive_all_before_the_break_is_kept(tmp_path: Path, compressed: bool) -> None:
    whole = write_tar(tmp_path / "a.tar", pairs(4)).read_bytes()
    sample = len(write_tar(tmp_path / "b.tar", pairs(1)).read_bytes().rstrip(b"\0")) // 512 * 512 + 512
    expected = rows(tmp_path / "a.tar")
    for cut in [0, 1, 511, *range(512, 4 * sample, 509), 4 * sample]:
        (tmp_path / "cut.tar").write_bytes(gzip.compress(whole[:cut], 1) if compressed else whole[:cut])
        *kept, last = rows(tmp_path / "cut.tar")
        assert isinstance(last, Fault)
        assert last.reason is Reason.BROKEN_ARCHIVE
        complete = cut // sample
        assert kept[:complete] == expected[:complete]
        assert len(kept) <= complete + 1


def test_a_broken_gzip_stream_is_a_broken_archive(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "a.tar.gz", pairs(20), "w:gz").read_bytes()
    damaged = whole[: len(whole) // 2] + b"\xff" * 100 + whole[len(whole) // 2 :]
    for data in (whole[: len(whole) // 2], whole[:-4], damaged):
        (tmp_path / "b.tar.gz").write_bytes(data)
        *_, last = rows(tmp_path / "b.tar.gz")
        assert isinstance(last, Fault)
        assert last.reason is Reason.BROKEN_ARCHIVE


def test_garbage_between_members_does_not_end_the_archive_silently(tmp_path: Path) -> None:
    first, second = (write_tar(tmp_path / f"{i}.tar", pairs(1, i)).read_bytes().rstrip(b"\0") for i in (1, 2))
    blocks = [data + bytes(-len(data) % 512) for data in (first, b"\xaa" * 512, second, bytes(1024))]
    (tmp_path / "a.tar").write_bytes(b"".join(blocks))
    assert brief(rows(tmp_path / "a.tar")) == [("000000001", b"caption 1"), (None, Reason.BROKEN_ARCHIVE)]


def test_archives_one_after_the_other_do_not_end_silently(tmp_path: Path) -> None:
    both = b"".join(write_tar(tmp_path / f"{i}.tar", pairs(1, i)).read_bytes() for i in (1, 2))
    (tmp_path / "a.tar").write_bytes(both)
    assert brief(rows(tmp_path / "a.tar")) == [("000000001", b"caption 1"), (None, Reason.BROKEN_ARCHIVE)]


def test_a_header_that_asks_for_much_memory_is_a_broken_archive(tmp_path: Path) -> None:
    header = member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME)[0]
    header.size = 2**40
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    assert brief(rows(tmp_path / "a.tar")) == [(None, Reason.BROKEN_ARCHIVE)]


@pytest.mark.parametrize("data", [b"", b"no tar", b"\0" * 512, b"x" * 5000])
def test_what_is_no_archive_is_one_fault(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(data)
    assert brief(rows(tmp_path / "a.tar")) in ([(None, Reason.BROKEN_ARCHIVE)], [])
    assert brief(rows(tmp_path / "a.tar")) or data == b"\0" * 512
