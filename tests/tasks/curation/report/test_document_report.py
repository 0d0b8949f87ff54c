"""Reports on small snapshots of documents written by hand, read back as a browser would."""

import re
from pathlib import Path
from typing import Any

import pytest

from storage.expire import expire
from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.curation.interleaved.difference import document_difference
from tasks.curation.interleaved.publish import publish_documents
from tasks.curation.report import write_report
from tasks.curation.report.pictures import thumbnail
from tests.tasks.curation.images import encoded, photograph
from tests.tasks.curation.interleaved.chain import publish
from tests.tasks.curation.interleaved.handmade import document, run, run_by_bytes, write
from tests.tasks.curation.report.page import Page

RULES: dict[str, Any] = {
    "images": {"conditions": {"side": "least(width, height) >= 20"}},
    "texts": {"words": "caption_words >= 2"},
    "documents": {"images": "kept_images >= 1", "complete": "missing_share < 0.6"},
    "one_per": ["key"],
    "prefer": ["caption_chars desc"],
}
HOSTILE = "</figure><script>alert(1)</script><img src=x onerror='alert(2)'>\u202e\0{{ 7 * 7 }}"


def curate(warehouse: Warehouse, source: Path, **content: Any) -> SnapshotRef:
    """Documents of which a is kept in part, small and torn are rejected, and one of the two named twice is."""
    write(
        source,
        document("kept", "first text", "b.jpg", "second text", "alone", "gone.jpg"),
        document("small", "third text", "a.jpg"),
        document("torn", "fourth text", "gone.jpg", "gone too.jpg"),
        document("twice", "fifth text", "b.jpg"),
        document("twice", "fifth text, the longer one", "b.jpg"),
    )
    return publish(warehouse, run(warehouse, source, **{**RULES, **content}))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report on what `curate` publishes by `RULES`."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "source").mkdir()
    warehouse = Warehouse(str(folder / "warehouse"))
    return report(warehouse, curate(warehouse, folder / "source"))


def report(warehouse: Warehouse, snapshot: SnapshotRef) -> str:
    return warehouse.read_bytes(write_report(snapshot, warehouse=warehouse).ref).decode()


def section(html: str, name: str) -> str:
    """The text of one section."""
    begin = html.index(f'<h2 id="{name}">')
    return Page(html[begin : html.index("<h2", begin + 1)]).words


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(page: str) -> None:
    read = Page(page)
    links = [a.get("src") or a.get("href") or a.get("xlink:href") or "" for _, a in read.tags]
    assert {link.split(":")[0][:1] for link in links if link} <= {"#", "d"}  # anchors and data URLs
    assert not read.all("script")
    assert "default-src 'none'" in read.all("meta")[2]["content"]


def test_every_link_of_the_page_leads_to_a_section(page: str) -> None:
    read = Page(page)
    places = {a["id"] for _, a in read.tags if "id" in a}
    assert {a["href"].removeprefix("#") for a in read.all("a")} <= places


def test_other_peoples_text_stays_text(warehouse: Warehouse, source: Path) -> None:
    hostile = {"url": HOSTILE, "extra": HOSTILE}
    write(
        source,
        document(HOSTILE, f"kept {HOSTILE}", "b.jpg") | hostile,
        document(HOSTILE + "small", f"rejected {HOSTILE}", "a.jpg", HOSTILE.replace(" ", "")) | hostile,
    )
    page = Page(report(warehouse, publish(warehouse, run(warehouse, source, **RULES))))
    assert not page.all("script")
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert "kept </figure><script>alert(1)</script>" in page.text
    assert "rejected </figure><script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text


def test_funnels_count_documents_texts_and_images(page: str) -> None:
    tables = re.findall(r'aria-label="Funnel of (\w+)".*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    rows = {what: re.findall(r"<tr><th[^>]*>([^<]*)</th>.*?<td class=\"n\">(.*?)</tr>", body) for what, body in tables}
    counts = {what: {name: re.findall(r"\d+", cells) for name, cells in found} for what, found in rows.items()}
    assert counts == {  # fails, only this, left
        "documents": {"images": ["2", "1", "3"], "complete": ["1", "0", "3"], "key": ["1", "1", "2"]},
        "texts": {"words": ["1", "1", "6"]},
        "images": {"missing": ["3", "3", "4"], "side": ["1", "1", "3"]},
    }


def test_measures_of_documents_texts_and_images_are_drawn_with_their_thresholds(page: str) -> None:
    drawn = {a["aria-label"].split(":")[0]: a["aria-label"].rpartition(" ")[2] for a in Page(page).all("figure")}
    assert drawn == {
        **{"kept_images": "1.0", "missing_share": "0.6", "caption_words": "2.0", "least(width, height)": "20.0"},
        **dict.fromkeys(("texts", "images", "missing_images", "kept_texts"), "none"),
    }


def test_a_kept_document_shows_what_is_published_in_order_and_what_was_left_out(page: str) -> None:
    kept = page[page.index('<h2 id="kept">') : page.index('<h2 id="rejected">')]
    (card,) = (part for part in kept.split('<li class="card">') if "<bdi>kept</bdi>" in part)
    published, left_out = card.split("<details", 1)
    assert re.findall(r"<bdi>([^<]*)</bdi>|<(img)", published) == [
        *(("kept", ""), ("first text", ""), ("", "img"), ("second text", "")),
    ]
    assert "2 left out" in left_out
    assert re.findall(r'<span class="tag">([^<]*)</span>', left_out) == ["words", "missing: missing_file"]


def test_rejected_documents_show_the_measured_value_and_equal_ones_who_stands_for_them(page: str) -> None:
    rejected = section(page, "rejected")
    assert re.search(r"torn images 0 complete 1 fails images, complete", rejected)
    assert re.search(r"one per key twice images 1 complete 0 [0-9a-f]{12}, equal in key, stands in its place", rejected)


def test_rejected_texts_and_images_show_the_measured_value(page: str) -> None:
    assert section(page, "texts") == "Texts words alone words 1 fails words"
    assert section(page, "images") == "Images side side 16 fails side small, segment 1"


def test_a_first_snapshot_has_nothing_to_compare_with(page: str) -> None:
    assert section(page, "changes") == "Changes This is the first snapshot of set."


def test_duplicate_images_are_shown_beside_their_survivor(warehouse: Warehouse, source: Path) -> None:
    write(source, document("k", "one", "a.jpg"), document("l", "two", "a.jpg", "b.jpg"))
    judged, pairs = run_by_bytes(warehouse, source)
    html = report(warehouse, publish_documents("set", judged, pairs, warehouse=warehouse).ref)
    assert re.search(r"1 stands back for one survivor [kl], segment 1 same [kl], segment 1", section(html, "images"))


def test_missing_images_are_counted_by_reason(warehouse: Warehouse, source: Path) -> None:
    (source / "bad.jpg").write_bytes(b"not an image")
    write(source, document("k", "one", "gone.jpg", "b.jpg"), document("l", "two", "gone.jpg", "bad.jpg"))
    html = report(warehouse, publish(warehouse, run(warehouse, source)))
    assert section(html, "missing").endswith("missing_file 2 not_an_image 1")
    assert "3 documents and images of the sources could not be read" in section(html, "quarantine")


def test_changes_name_documents_and_their_segments(warehouse: Warehouse, source: Path) -> None:
    curate(warehouse, source, images={})
    second = section(report(warehouse, curate(warehouse, source, texts={})), "changes")
    because = "words: no longer asked (caption_words >= 2) 1"
    assert f"changed text added, {because}" in second
    assert second.endswith(f"segments text added {because}")


def test_every_image_has_alternative_text(page: str) -> None:
    said = [image["alt"] for image in Page(page).all("img")]
    assert "image at place 2" in said
    assert all(said)


def test_a_snapshot_that_keeps_nothing_has_a_report_too(warehouse: Warehouse, source: Path) -> None:
    page = Page(report(warehouse, curate(warehouse, source, documents={"none": "key = 'x'"}, one_per=[], prefer=[])))
    assert "keeps 0 of 5 documents" in page.words


def test_a_report_is_written_once_comes_out_the_same_and_goes_with_its_snapshot(
    warehouse: Warehouse, source: Path
) -> None:
    first = curate(warehouse, source)
    html = report(warehouse, first)
    assert write_report(first, warehouse=warehouse).cached
    warehouse.remove(first.report)
    assert report(warehouse, first) == html
    second = curate(warehouse, source, texts={})
    document_difference(second, warehouse=warehouse)
    warehouse.create_bytes(second.report, b"")
    expire(warehouse, "set", keep=1)
    assert [warehouse.exists(snapshot.report) for snapshot in (first, second)] == [False, True]


def test_a_report_of_many_conditions_and_long_documents_stays_under_five_megabytes(
    warehouse: Warehouse, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jpegs = {side: thumbnail(encoded(photograph(800, 600), "JPEG"), side) for side in (96, 128)}
    for module in ("pictures", "document_sheet"):
        monkeypatch.setattr(f"tasks.curation.report.{module}.thumbnail", lambda data, side=128: jpegs[side])
    fails = {f"c{at}": f"caption_words < {at}" for at in range(1, 56)}
    small = {f"c{at}": f"width >= {25 + at / 10}" for at in range(55)}
    write(source, *(document(f"k{at}", *["a.jpg", "b.jpg", "words " * 100, "no"] * 6) for at in range(12)))
    rules = {"documents": fails, "texts": {"words": "caption_words > 1"}, "images": {"conditions": small}}
    html = report(warehouse, publish(warehouse, run(warehouse, source, **rules)))
    assert html.count("<img") > 350
    assert len(html.encode()) < 5_000_000
