"""Reports on small snapshots written by hand, read back as a browser would."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.curation.decide import decide
from tasks.curation.policy import Policy
from tasks.curation.publish import publish
from tasks.curation.report import write_report
from tasks.curation.report.pictures import SIDE, thumbnail
from tests.tasks.curation.handmade import write_pairs, write_pool, write_signals
from tests.tasks.curation.images import encoded, photograph
from tests.tasks.curation.report.page import Page

POLICY = Policy.model_validate(
    {
        "name": "p",
        "conditions": {
            "side": "least(width, height) >= 200",
            "clip": "clip_score >= 0.28",
            "english": "language = 'en'",
        },
        "duplicates": {"exact": ["bytes"]},
    }
)
HOSTILE = "</figure><script>alert(1)</script><img src=x onerror='alert(2)'>\u202e\0{{ 7 * 7 }}"


@pytest.fixture
def warehouse(tmp_path: Path) -> Warehouse:
    return Warehouse(str(tmp_path))


def curate(warehouse: Warehouse, samples: dict[str, dict[str, Any]], *, pairs=(), policy=POLICY) -> SnapshotRef:
    pool = write_pool(warehouse, samples)
    signals = write_signals(warehouse, pool, samples)
    evidence = [write_pairs(warehouse, "bytes", [(*pair, 0) for pair in pairs])]
    decisions = decide(pool, policy, signals, evidence, warehouse=warehouse).ref
    return publish("set", pool, decisions, policy, signals, evidence, warehouse=warehouse).ref


def report(warehouse: Warehouse, snapshot: SnapshotRef) -> str:
    return warehouse.read_bytes(write_report(snapshot, warehouse=warehouse).ref).decode()


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(warehouse):
    page = Page(report(warehouse, curate(warehouse, {"a": {}, "b": {"clip_score": 0.1}})))
    links = [a.get("src") or a.get("href") or a.get("xlink:href") or "" for _, a in page.tags]
    assert {link.split(":")[0][:1] for link in links if link} <= {"#", "d"}  # anchors and data URLs
    assert not page.all("script")
    assert "default-src 'none'" in page.all("meta")[2]["content"]


def test_other_peoples_text_stays_text(warehouse):
    samples = {"a": {"caption": HOSTILE}, "b": {"caption": HOSTILE, "clip_score": 0.1}}
    page = Page(report(warehouse, curate(warehouse, samples)))
    assert not page.all("script")
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    assert page.text.count("<script>alert(1)</script>") == 2
    assert "{{ 7 * 7 }}" in page.text


def test_the_overlap_counts_samples_that_fail_both(warehouse):
    small, bad, foreign = {"width": 100}, {"clip_score": 0.1}, {"language": "fr"}
    samples = {"ok": {}, "s": small, "s2": small, "sb": small | bad, "sbf": small | bad | foreign, "f": foreign}
    html = report(warehouse, curate(warehouse, samples))
    table = html[html.index('aria-label="Overlap') :]
    cells = re.findall(r'<td class="n"[^>]*>([^<]*)</td>', table[: table.index("</table>")])
    # rows and columns: side, clip, english; the diagonal is what only this condition rejects
    assert cells == ["2", "2", "1", "2", "·", "1", "1", "1", "1"]


def test_histograms_show_each_measure_with_its_threshold_in_words_too(warehouse):
    page = Page(report(warehouse, curate(warehouse, {f"s{at}": {"clip_score": at / 10} for at in range(10)})))
    labels = [a["aria-label"] for a in page.all("figure")]
    assert len(labels) == 2
    assert labels[0].startswith("least(width, height): median 480")
    assert labels[1].endswith("thresholds 0.28")
    assert "median 0.45" in labels[1]


def test_a_top_fractions_line_stands_where_its_last_sample_passed(warehouse):
    policy = Policy.model_validate(
        {"name": "p", "conditions": {"best": {"top_fraction": 0.3, "of": "clip_score"}}, "duplicates": {}}
    )
    samples = {f"s{at}": {"clip_score": at / 8} for at in range(8)}
    snapshot = curate(warehouse, samples, policy=policy)
    assert "thresholds 0.625" in report(warehouse, snapshot)


def test_duplicates_are_shown_beside_their_survivor(warehouse):
    snapshot = curate(warehouse, {"a": {}, "b": {}, "c": {}}, pairs=[("a", "b"), ("a", "c")])
    page = Page(report(warehouse, snapshot))
    assert "2 stand back for one" in page.text
    survivors = [a for a in page.all("li") if "survivor" in a.get("class", "")]
    assert len(survivors) == 1
    assert page.text.count("exact, distance 0") == 2


def test_every_image_has_its_caption_as_alternative_text(warehouse, monkeypatch):
    monkeypatch.setattr("tasks.curation.report.pictures.thumbnail", lambda data: "data:image/jpeg;base64,AAAA")
    page = Page(report(warehouse, curate(warehouse, {"a": {"caption": "a red ball"}, "b": {"caption": None}})))
    assert sorted(a["alt"] for a in page.all("img")) == ["a red ball", "image without a caption"]


def test_a_report_is_written_once_and_comes_out_the_same(warehouse):
    snapshot = curate(warehouse, {"a": {}, "b": {"clip_score": 0.1}})
    first = report(warehouse, snapshot)
    assert write_report(snapshot, warehouse=warehouse).cached
    warehouse.remove(snapshot.report)
    assert report(warehouse, snapshot) == first


def test_a_report_of_many_conditions_stays_under_five_megabytes(warehouse, monkeypatch):
    jpeg = thumbnail(encoded(photograph(800, 600), "JPEG"))
    monkeypatch.setattr("tasks.curation.report.pictures.thumbnail", lambda data: jpeg)
    conditions = {f"c{at}": f"width >= {2000 + at}" for at in range(56)}
    policy = Policy.model_validate({"name": "p", "conditions": conditions})
    snapshot = curate(warehouse, {f"s{at:03}": {} for at in range(200)}, policy=policy)
    assert len(report(warehouse, snapshot).encode()) < 5_000_000


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "L", "RGBA"])
def test_thumbnails_are_small_jpegs_of_any_image(mode: str):
    kind = "JPEG" if mode in ("CMYK", "L") else "PNG"
    url = thumbnail(encoded(photograph(640, 480).convert(mode), kind))
    image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (SIDE, SIDE * 3 // 4))


@pytest.mark.parametrize("data", [None, b"", b"not an image"])
def test_what_cannot_be_decoded_has_no_thumbnail(data):
    assert thumbnail(data) is None
