"""Files that ship with the code, asked for from another folder."""

from pathlib import Path

import pytest

from tasks.curation.policy import load_policy
from tasks.curation.signals.clip_checkpoint import find_checkpoint
from tasks.shipped import ROOT, find_path
from tasks.training.base_model import find_base_model, find_config
from tasks.training.recipe import load_recipe

POLICY = "deployments/policies/default.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shipped_policies_recipes_and_models_are_found_from_any_folder() -> None:
    assert load_policy(POLICY).name == "default"
    recipe = load_recipe("deployments/recipes/sample.yaml")
    assert find_base_model(recipe.base_model).folder == ROOT / "tasks/sample_models/gemma"
    assert find_config(recipe.base_model) == ROOT / "tasks/sample_models/gemma/config.json"
    assert find_checkpoint("local-dir:tasks/sample_models/clip", None).model.endswith(
        str(ROOT / "tasks/sample_models/clip")
    )


def test_a_file_of_the_current_folder_comes_first(elsewhere: Path) -> None:
    own = elsewhere / POLICY
    own.parent.mkdir(parents=True)
    own.write_text("name: own\n")
    assert load_policy(POLICY).name == "own"


def test_what_is_nowhere_stays_as_it_was_given() -> None:
    assert find_path("deployments/policies/nothing.yaml") == Path("deployments/policies/nothing.yaml")
    assert find_path("/deployments/policies/default.yaml") == Path("/deployments/policies/default.yaml")
