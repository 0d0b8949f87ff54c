import os
import sys
from pathlib import Path

import ftlangdetect
import pyarrow as pa
import pytest

from tasks.curation.batch import Batch
from tasks.curation.signals import language
from tasks.curation.signals.contract import MissingWeights
from tasks.curation.signals.language import MODEL_FILE, Language, place_model

CAPTIONS = [
    "A red circle above two blue squares",
    "Ein roter Kreis über zwei blauen Quadraten",
    "Un círculo rojo sobre dos cuadrados azules",
    "二つの青い四角の上に赤い丸",
    "Красный круг над двумя синими квадратами",
    "dog",
    "🎉",
    "line one\nline two\r\n\tand three",
    "no-break\u00a0space and \u2028 line separator",
]


@pytest.fixture(autouse=True)
def unplaced() -> None:
    place_model.cache_clear()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model folder, with nothing loaded and no network to load from."""
    monkeypatch.setenv(language.CACHE_VARIABLE, str(tmp_path / "models"))
    module = sys.modules["ftlangdetect.detect"]  # the package's attribute of that name is the function in it
    monkeypatch.setattr(module, "_models", {})
    monkeypatch.setattr(module.requests, "get", lambda *_, **__: pytest.fail("tried to download"))
    return tmp_path / "models"


def detected(*captions: str | None) -> list[tuple[str | None, float | None]]:
    rows = Language().measure(Batch(pa.array(captions, pa.string()))).to_pylist()
    return [(row["language"], row["language_score"]) for row in rows]


def test_labels_and_scores_are_those_of_ftlangdetect() -> None:
    place_model()
    expected = [ftlangdetect.detect(caption, low_memory=True) for caption in CAPTIONS]
    assert detected(*CAPTIONS) == [(e["lang"], pytest.approx(e["score"])) for e in expected]


def test_languages_are_told_apart() -> None:
    assert [label for label, _ in detected(*CAPTIONS[:5])] == ["en", "de", "es", "ja", "ru"]


@pytest.mark.parametrize("caption", [None, "", " \n\t", "\0", "\0 \u00a0"])
def test_without_text_there_is_no_language(caption: str | None) -> None:
    assert detected(caption) == [(None, None)]


def test_a_nul_separates_words() -> None:
    assert detected("Ein roter\0Kreis und ein Quadrat") == detected("Ein roter Kreis und ein Quadrat")


def test_the_model_comes_out_of_the_package_and_nothing_is_downloaded(empty_cache: Path) -> None:
    assert detected("a plain English caption")[0][0] == "en"
    assert [file.name for file in empty_cache.iterdir()] == [MODEL_FILE]


def test_without_the_variable_the_users_cache_is_used(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(language.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_cache))
    assert place_model() == empty_cache / "tamis" / "fasttext" / MODEL_FILE
    assert os.environ[language.CACHE_VARIABLE] == str(empty_cache / "tamis" / "fasttext")


def test_a_damaged_model_file_is_named_and_left_alone(empty_cache: Path) -> None:
    empty_cache.mkdir()
    (empty_cache / MODEL_FILE).write_bytes(b"damaged")
    with pytest.raises(MissingWeights, match=f"{MODEL_FILE} is not the"):
        detected("a caption")
    assert (empty_cache / MODEL_FILE).read_bytes() == b"damaged"
