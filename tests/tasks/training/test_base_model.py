import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tasks.training import base_model
from tasks.training.base_model import MissingBaseModel, UnsafeBaseModel, find_base_model, find_config


@pytest.fixture
def copy(gemma: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(gemma, tmp_path / "gemma"))


def test_a_folder_is_named_by_its_content(gemma: Path, copy: Path) -> None:
    assert find_base_model(str(copy)).fingerprint == find_base_model(str(gemma)).fingerprint
    assert find_base_model(str(copy)).folder == copy


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json"])
def test_any_changed_file_makes_it_another_model(copy: Path, file: str) -> None:
    before = find_base_model(str(copy)).fingerprint
    (copy / file).write_text((copy / file).read_text() + " ")
    assert find_base_model(str(copy)).fingerprint != before


def test_pickled_weights_are_not_accepted(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(
        MissingBaseModel, match=r"Pickled weights \(pytorch_model\.bin\) are not read, because they can"
    ):
        find_base_model(str(copy))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_a_model_with_code_of_its_own_is_refused_and_its_code_not_run(copy: Path, file: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    (copy / "own.py").write_text(f"open({str(trap)!r}, 'w')\n")
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(
        UnsafeBaseModel, match=rf"{file}: auto_map names code that comes with the model, which is never"
    ):
        find_base_model(str(copy))
    assert not trap.exists()


def test_a_hub_model_with_code_of_its_own_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.Config"}}))
    monkeypatch.setattr(base_model, "snapshot_download", lambda *_, **__: str(copy))
    with pytest.raises(UnsafeBaseModel):
        find_base_model("somebody/model")


def test_no_pickles_and_no_code_are_downloaded() -> None:
    names = ["pytorch_model.bin", "model.pt", "weights.pkl", "modeling_own.py", "training_args.bin"]
    assert not [name for name in names if any(fnmatch(name, pattern) for pattern in base_model.FILES)]
    assert any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in base_model.FILES)


def test_a_hub_name_without_network_says_what_to_give_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingBaseModel) as caught:
        find_base_model("google/gemma-4-E4B-it")
    assert "base model 'google/gemma-4-E4B-it': no such folder" in str(caught.value)
    assert "Give the path of a local model folder" in str(caught.value)


def test_a_mistyped_folder_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(MissingBaseModel, match="no such folder"):
        find_base_model(str(tmp_path / "nothing"))


def test_a_configuration_needs_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert find_config(str(copy)) == copy / "config.json"
    (copy / "config.json").unlink()
    with pytest.raises(MissingBaseModel, match=r"holds no config\.json"):
        find_config(str(copy))
