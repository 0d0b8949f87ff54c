import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from tasks.curation.sample import write_extra, write_sample
from tasks.curation.sample_truth import DUPLICATE_RULES, FILTERS, SampleDecision, SampleTruth, score_filters

Members = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> SampleTruth:
    return write_sample(tmp_path_factory.mktemp("sample"), samples=150)


@pytest.fixture(scope="module")
def members(truth: SampleTruth) -> Members:
    """By key and extension, the bytes of each member."""
    found: Members = {}
    for path in sorted(truth.folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, extension = member.name.split(".")
                file = archive.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[extension] = file.read()
    return found


def keys(truth: SampleTruth, *oddities: str | None) -> list[str]:
    return [sample.key for sample in truth.samples if sample.oddity in oddities]


def image_bytes(members: Members, key: str) -> bytes:
    return next(data for extension, data in members[key].items() if extension not in ("txt", "json"))


def picture(members: Members, key: str) -> Image.Image:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(image_bytes(members, key))))
    image.load()
    return image


def caption(members: Members, key: str) -> str:
    return members[key]["txt"].decode()


def test_every_sample_has_an_image_a_caption_and_the_metadata_that_img2dataset_writes(
    truth: SampleTruth, members: Members
) -> None:
    assert list(members) == [sample.key for sample in truth.samples]
    for key, files in members.items():
        assert len(files) == 3
        metadata = json.loads(files["json"])
        assert metadata["key"] == key
        assert {"caption", "url", "status", "width", "height", "sha256"} <= metadata.keys()


def test_every_kind_of_oddity_is_planted(truth: SampleTruth) -> None:
    assert set(FILTERS) == {sample.oddity for sample in truth.samples if sample.oddity}


def test_writing_again_gives_the_same_bytes(truth: SampleTruth, tmp_path: Path) -> None:
    write_sample(tmp_path, samples=150)
    for path in sorted(truth.folder.iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_extra_samples_go_to_a_tar_of_their_own(tmp_path: Path) -> None:
    before = write_sample(tmp_path, samples=100)
    bytes_before = (tmp_path / "00000.tar").read_bytes()
    after = write_extra(tmp_path, samples=10)
    assert (tmp_path / "00000.tar").read_bytes() == bytes_before
    assert after.samples[:100] == before.samples
    assert {sample.shard for sample in after.samples[100:]} == {"00001.tar"}
    assert len({sample.key for sample in after.samples}) == 110
    assert SampleTruth.read(tmp_path) == after


def test_too_few_samples_for_every_fault_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 100"):
        write_sample(tmp_path, samples=99)


def test_unreadable_files_fail_to_open_in_pillow(truth: SampleTruth, members: Members) -> None:
    for key in keys(truth, "truncated_file", "bogus_file", "empty_file", "decompression_bomb"):
        with pytest.raises((OSError, Image.DecompressionBombError)):
            picture(members, key)


def test_bombs_are_small_files_of_valid_png_chunks_that_declare_huge_images(
    truth: SampleTruth, members: Members, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    for key in keys(truth, "decompression_bomb"):
        data = image_bytes(members, key)
        assert len(data) < 200_000
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (30_000, 30_000)
            image.verify()


def test_everyday_and_odd_but_good_images_decode_at_their_declared_size(truth: SampleTruth, members: Members) -> None:
    good = (None, "cmyk", "exif_rotated", "palette", "animated", "grayscale", "mismatched_caption", "semantic_copy")
    for key in keys(truth, *good):
        metadata = json.loads(members[key]["json"])
        image = picture(members, key)
        assert image.size == (metadata["width"], metadata["height"])
        assert min(image.size) >= 200
        assert max(image.size) <= 3 * min(image.size)


def test_odd_formats_are_what_they_are_called(truth: SampleTruth, members: Members) -> None:
    for oddity, mode in (("cmyk", "CMYK"), ("palette", "P"), ("grayscale", "L")):
        assert {Image.open(io.BytesIO(image_bytes(members, key))).mode for key in keys(truth, oddity)} == {mode}
    for key in keys(truth, "exif_rotated"):
        assert Image.open(io.BytesIO(image_bytes(members, key))).getexif()[0x0112] != 1
    for key in keys(truth, "animated"):
        assert getattr(Image.open(io.BytesIO(image_bytes(members, key))), "n_frames", 1) > 1


def test_sizes_meant_to_fail_do_and_by_one_condition_only(truth: SampleTruth, members: Members) -> None:
    for key in keys(truth, "small_image"):
        width, height = picture(members, key).size
        assert min(width, height) < 200
        assert max(width, height) <= 3 * min(width, height)
    for key in keys(truth, "extreme_aspect"):
        width, height = picture(members, key).size
        assert min(width, height) >= 200
        assert max(width, height) > 3 * min(width, height)


def test_copies_and_only_copies_are_perceptually_close_unless_they_were_altered(
    truth: SampleTruth, members: Members
) -> None:
    readable = [
        sample
        for sample in truth.samples
        if sample.oddity not in ("truncated_file", "bogus_file", "empty_file", "decompression_bomb")
    ]
    hashes = [imagehash.phash(picture(members, sample.key).convert("RGB")).hash.ravel() for sample in readable]
    codes = np.array(hashes, dtype=int)
    distances = codes @ (1 - codes).T + (1 - codes) @ codes.T
    for row, one in enumerate(readable):
        for column, other in enumerate(readable[:row]):
            is_copy = one.group is not None and one.group == other.group
            is_altered = "semantic_copy" in (one.oddity, other.oddity)
            assert (distances[row, column] <= 4) == (is_copy and not is_altered), (one.key, other.key)


def test_byte_copies_have_their_originals_bytes_under_another_key(truth: SampleTruth, members: Members) -> None:
    for sample in truth.samples:
        if sample.oddity == "byte_copy":
            assert sample.group is not None
            assert sample.group != sample.key
            assert image_bytes(members, sample.key) == image_bytes(members, sample.group)


def test_captions_meant_to_fail_by_length_do(truth: SampleTruth, members: Members) -> None:
    assert all(len(caption(members, key).split()) > 200 for key in keys(truth, "long_caption"))
    assert all(len(caption(members, key).split()) < 5 for key in keys(truth, "short_caption"))
    for key in keys(truth, None, "boilerplate_caption", "mismatched_caption"):
        assert 5 <= len(caption(members, key).split()) <= 200


def test_mismatched_captions_do_not_name_the_answers_shape(truth: SampleTruth, members: Members) -> None:
    for sample in truth.samples:
        if sample.oddity == "mismatched_caption":
            assert sample.answer.split()[1] not in caption(members, sample.key).lower()


def test_undecodable_captions_are_not_utf8(truth: SampleTruth, members: Members) -> None:
    for key in keys(truth, "caption_not_utf8"):
        with pytest.raises(UnicodeDecodeError):
            caption(members, key)


def duplicate(key: str, of: str | None, *, rule: str | None) -> SampleDecision:
    return SampleDecision(key, kept=False, duplicate_of=of, duplicate_rule=rule)


def ideal_decisions(truth: SampleTruth) -> list[SampleDecision]:
    decisions = []
    for sample in truth.samples:
        expected = FILTERS[sample.oddity][0] if sample.oddity else "kept"
        if expected == "quarantine":
            decisions.append(SampleDecision(sample.key, kept=False, quarantined=True))
        elif expected in DUPLICATE_RULES:
            decisions.append(duplicate(sample.key, sample.group, rule=expected))
        elif expected == "kept":
            decisions.append(SampleDecision(sample.key, kept=True))
        else:
            decisions.append(SampleDecision(sample.key, kept=False, failed=(expected,)))
    return decisions


def test_ideal_decisions_score_one_everywhere(truth: SampleTruth) -> None:
    scores = score_filters(truth, ideal_decisions(truth))
    assert [score.oddity for score in scores] == list(FILTERS)
    assert {score.recall for score in scores} == {1.0}
    assert {score.precision for score in scores} == {1.0, None}
    assert {score.precision for score in scores if score.filters == ("kept",)} == {None}


def test_a_copy_counts_as_found_when_its_original_was_dropped_instead(truth: SampleTruth) -> None:
    swapped = [
        duplicate(decision.duplicate_of, decision.key, rule=decision.duplicate_rule)
        for decision in ideal_decisions(truth)
        if decision.duplicate_of
    ]
    scores = {score.oddity: score for score in score_filters(truth, swapped)}
    assert scores["resized_copy"].recall == 1.0
    assert scores["resized_copy"].precision == 1.0


def test_rejecting_a_fault_free_sample_costs_that_filter_precision(truth: SampleTruth) -> None:
    clean, cmyk = keys(truth, None)[0], keys(truth, "cmyk")[0]
    decisions = {decision.key: decision for decision in ideal_decisions(truth)}
    decisions[clean] = SampleDecision(clean, kept=False, failed=("aspect",))
    decisions[cmyk] = SampleDecision(cmyk, kept=False, failed=("aspect",))
    scores = {score.oddity: score for score in score_filters(truth, decisions.values())}
    planted = Counter(sample.oddity for sample in truth.samples)["extreme_aspect"]
    assert scores["extreme_aspect"].precision == pytest.approx(planted / (planted + 2))
    assert scores["extreme_aspect"].recall == 1.0
    assert scores["cmyk"].recall == pytest.approx(1 - 1 / scores["cmyk"].planted)


def test_rejecting_a_sample_with_another_fault_costs_no_precision(truth: SampleTruth) -> None:
    url = keys(truth, "url_caption")[0]
    decisions = {decision.key: decision for decision in ideal_decisions(truth)}
    decisions[url] = SampleDecision(url, kept=False, failed=("words", "caption_text"))
    scores = {score.oddity: score for score in score_filters(truth, decisions.values())}
    assert scores["short_caption"].precision == 1.0


def test_a_duplicate_of_an_unrelated_sample_is_a_wrong_rejection(truth: SampleTruth) -> None:
    one, other = keys(truth, None)[:2]
    scores = score_filters(truth, [duplicate(one, other, rule="exact")])
    assert next(score for score in scores if score.oddity == "byte_copy").precision == 0.0


def test_each_duplicate_rule_is_scored_apart(truth: SampleTruth) -> None:
    one, other = keys(truth, None)[:2]
    by_another_rule = [
        duplicate(decision.key, decision.duplicate_of, rule="semantic")
        if decision.duplicate_rule == "perceptual"
        else decision
        for decision in ideal_decisions(truth)
    ]
    scores = {
        score.oddity: score
        for score in score_filters(truth, [*by_another_rule, duplicate(one, other, rule="semantic")])
    }
    assert (scores["resized_copy"].recall, scores["resized_copy"].precision) == (0.0, None)
    found = scores["semantic_copy"].planted + scores["resized_copy"].planted
    assert scores["semantic_copy"].precision == pytest.approx(found / (found + 1))
    assert scores["byte_copy"].precision == 1.0


def test_samples_without_a_decision_count_as_not_found(truth: SampleTruth) -> None:
    assert {score.recall for score in score_filters(truth, [])} == {0.0}
