import pickle
import subprocess
import sys
from importlib.resources import files
from typing import get_args

import pytest
from pydantic import ValidationError

from tasks.curation.signals import SignalName, SignalSettings, build_signals

CLIP = f"local-dir:{files('tasks.sample_models')}/clip"


PINNED = {"file": "some.pth", "sha256": "0" * 64}
DEFAULT = SignalSettings().measure
FILES = dict.fromkeys(("aesthetic_head", "clip_nsfw_head", "centroids", "wanted_clusters"), PINNED)


def test_what_needs_no_file_of_the_users_and_little_time_is_built_by_default() -> None:
    names = [signal.name for signal in build_signals(SignalSettings())]
    assert names == ["size", "caption", "characters", "words", "language", "exact", "perceptual", "clip", "nsfw"]


def test_every_signal_can_be_built() -> None:
    every = get_args(SignalName)
    assert {signal.name for signal in build_signals(SignalSettings(measure=every, **FILES))} == set(every)


def test_a_signal_on_embeddings_is_refused_without_its_file_or_clip() -> None:
    with pytest.raises(ValidationError, match="without aesthetic_head"):
        SignalSettings(measure=("clip", "aesthetic"))
    with pytest.raises(ValidationError, match="without wanted_clusters"):
        SignalSettings(measure=("clip", "cluster"), centroids=PINNED)
    with pytest.raises(ValidationError, match="add clip to measure"):
        SignalSettings(measure=("clip_nsfw",), clip_nsfw_head=PINNED)


def test_a_file_is_refused_without_a_checksum() -> None:
    for given in ({"file": "some.pth"}, {"file": "some.pth", "sha256": "abc"}):
        with pytest.raises(ValidationError, match="sha256"):
            SignalSettings(aesthetic_head=given)


def test_only_what_is_asked_for_is_built() -> None:
    assert [s.name for s in build_signals(SignalSettings(measure=("nsfw", "size")))] == ["size", "nsfw"]


def test_an_unknown_signal_is_refused() -> None:
    with pytest.raises(ValidationError, match="perceptual"):
        SignalSettings(measure=("phash",))


def test_column_names_of_all_signals_differ_and_are_described() -> None:
    settings = SignalSettings(measure=get_args(SignalName), clip_model=CLIP, text_embedding=True, **FILES)
    columns = [column for signal in build_signals(settings) for column in signal.columns]
    assert len({column.name for column in columns}) == len(columns)
    assert all(column.metadata[b"description"] for column in columns)


def test_signals_are_equal_hashable_and_picklable_by_their_settings() -> None:
    signals = build_signals(SignalSettings(measure=(*DEFAULT, "sharpness", "faces", "text_area"), clip_model=CLIP))
    again = pickle.loads(pickle.dumps(signals))
    assert again == signals
    assert [signal.ref for signal in again] == [signal.ref for signal in signals]
    assert len({*signals, *again}) == len(signals)


def test_finding_all_references_imports_neither_torch_nor_open_clip() -> None:
    code = (
        "import sys; from tasks.curation.signals import SignalSettings, build_signals\n"
        f"[signal.ref for signal in build_signals(SignalSettings(clip_model={CLIP!r}))]\n"
        "assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
