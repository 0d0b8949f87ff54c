import shutil
from pathlib import Path

import pytest

from tasks.training.base_model import MissingBaseModel, find_base_model, find_config


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
    with pytest.raises(MissingBaseModel, match=r"holds no config\.json with \*\.safetensors"):
        find_base_model(str(copy))


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
