"""Two processes against one: the same samples, losses and adapter, whole or sharded, undisturbed or killed."""

import json
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from storage.refs import SnapshotRef
from storage.warehouse import Warehouse
from tasks.training.checkpoints import COMPLETE
from tasks.training.child import CHECKED_ROWS
from tasks.training.dataset import write_examples
from tasks.training.distributed import check_sharded, loading, passes_per_process, trainer_arguments, zero3_config
from tasks.training.fit import train
from tasks.training.model import ModelError, Placement, load_adapter, load_model
from tasks.training.process import run_child
from tasks.training.recipe import Recipe, RecipeError
from tests.tasks.squares import publish

HELD_OUT = {"early_stop_patience": 9}  # one loss on held-out rows for each checkpoint; it never stops early
FULL = {"method": "full", "full_parts": ["language", "projector"], **HELD_OUT}
ZERO3 = {"full_zero3": {**FULL, "gpus": 2, "sharding": "zero3"}}
WAYS: dict[str, dict[str, Any]] = {
    "one": HELD_OUT,
    "two": {**HELD_OUT, "gpus": 2},
    "one_nf4": {"quantization": "nf4"},
    "fsdp_nf4": {"quantization": "nf4", "gpus": 2, "sharding": "fsdp"},
    "fsdp_nf4_killed": {"quantization": "nf4", "gpus": 2, "sharding": "fsdp"},
    "full": FULL,
    "full_fsdp": {**FULL, "gpus": 2, "sharding": "fsdp"},
    "full_fsdp_killed": {**FULL, "gpus": 2, "sharding": "fsdp"},
    **(ZERO3 if find_spec("deepspeed") else {}),
}
STEPS = 4
pytestmark = pytest.mark.timeout(600)  # all trainings of the module run in its first test
KILL = {"rank": 1, "at_batch": CHECKED_ROWS + 3}  # in the third step; checkpoints are of the second and fourth


@dataclass(frozen=True)
class Trained:
    """What a training left behind."""

    folder: Path
    result: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return [json.loads(line)["loss"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def held_out(self) -> list[float]:
        """The losses on held-out rows that led to the choice of the best checkpoint."""
        [state] = self.folder.glob(f"checkpoints*/checkpoint-{STEPS}/trainer_state.json")
        return [entry["eval_loss"] for entry in json.loads(state.read_text())["log_history"] if "eval_loss" in entry]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        [file] = (self.folder / "adapter").glob("*.safetensors")
        return load_file(file)

    def held(self, rank: int) -> dict[str, int]:
        """Bytes of weights in the memory of a process, once the model is `loaded` and once it is `shared`."""
        found: dict[str, int] = json.loads((self.folder / f"held-{rank}.json").read_text())
        return found

    def batches(self, rank: int) -> list[str]:
        """The ids in each batch, without those that the loss mask was checked on."""
        return (self.folder / f"seen-{rank}.txt").read_text().splitlines()[CHECKED_ROWS:]


@pytest.fixture(scope="module")
def ways(
    squares: tuple[Warehouse, SnapshotRef], recipe: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Trained]:
    """The same training in every one of `WAYS`."""
    warehouse, snapshot = squares
    root = tmp_path_factory.mktemp("ways")
    files = {
        name: str(write_examples(snapshot, recipe, split=split, warehouse=warehouse, path=root / f"{name}.arrow").path)
        for name, split in (("examples", "train"), ("validation", "validation"))
    }
    trainings = {}
    for name, fields in WAYS.items():
        way = Recipe.model_validate({**recipe.model_dump(), "lora_dropout": 0, "max_steps": STEPS, **fields})
        config = {"recipe": way.model_dump(), "model": way.base_model, "parent_adapter": None, **files}
        trainings[name] = {"processes": way.gpus, "config": config, "kill": KILL if "killed" in name else None}
    results = run_child("tests.tasks.training.shared_child", {"trainings": trainings}, folder=root, on_log=print)
    return {name: Trained(root / name, result) for name, result in results.items()}


def assert_same(found: Trained, expected: Trained) -> None:
    assert len(expected.losses) == STEPS
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    weights, wanted = found.weights, expected.weights
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)


def assert_exactly_continued(killed: Trained, undisturbed: Trained) -> None:
    assert len(killed.batches(0)) > len(undisturbed.batches(0))  # the third step came twice
    assert killed.losses == undisturbed.losses
    weights = killed.weights
    assert all(torch.equal(weights[name], weight) for name, weight in undisturbed.weights.items())


def test_two_processes_train_what_one_does(ways: dict[str, Trained]) -> None:
    assert_same(ways["two"], ways["one"])


def test_each_process_sees_every_other_batch_of_one_process(ways: dict[str, Trained]) -> None:
    alone = ways["one"].batches(0)
    assert len(alone) == STEPS * 2
    assert [ways["two"].batches(rank) for rank in (0, 1)] == [alone[0::2], alone[1::2]]


def test_a_pass_shows_every_sample_once(ways: dict[str, Trained]) -> None:
    seen = " ".join(ways["one"].batches(0)).split()
    assert sorted(seen[:13]) == sorted(set(seen))


def test_metrics_count_the_tokens_of_all_processes(ways: dict[str, Trained]) -> None:
    one, two = ways["one"].result, ways["two"].result
    assert (two["tokens"], two["steps"]) == (one["tokens"], one["steps"])
    assert (one["processes"], two["processes"]) == (1, 2)


@pytest.mark.parametrize(("way", "alone"), [("two", "one"), ("full_fsdp", "full")])
def test_held_out_rows_count_once_however_processes_share_them(ways: dict[str, Trained], way: str, alone: str) -> None:
    assert ways[way].held_out == pytest.approx(ways[alone].held_out, rel=1e-5)
    assert len(ways[alone].held_out) == STEPS // 2


def test_fsdp_of_a_four_bit_model_trains_what_one_process_does(ways: dict[str, Trained]) -> None:
    assert_same(ways["fsdp_nf4"], ways["one_nf4"])
    checkpoint = ways["fsdp_nf4"].folder / "checkpoints-fsdp" / f"checkpoint-{STEPS}"
    assert len(list(checkpoint.glob("pytorch_model_fsdp_0/*.distcp"))) == 2  # a part from each process
    assert ways["fsdp_nf4"].result["four_bit_layers"] == ways["one_nf4"].result["four_bit_layers"] > 0


def test_a_weight_left_whole_on_every_gpu_is_reported() -> None:
    with pytest.raises(ModelError, match=r"sharding: 2 of 2 weights are whole in every process: weight, bias"):
        check_sharded(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("way", ["fsdp_nf4", "full_fsdp"])
def test_a_sharded_training_goes_on_after_one_process_was_killed(ways: dict[str, Trained], way: str) -> None:
    assert_exactly_continued(ways[f"{way}_killed"], ways[way])


def test_fsdp_in_full_trains_what_one_process_does(ways: dict[str, Trained]) -> None:
    assert_same(ways["full_fsdp"], ways["full"])


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed, an extra, is not installed")
def test_zero3_in_full_trains_what_one_process_does(ways: dict[str, Trained]) -> None:
    assert_same(ways["full_zero3"], ways["full"])


def test_what_processes_trained_in_full_becomes_an_ordinary_model(
    ways: dict[str, Trained], gemma: Path, tmp_path: Path
) -> None:
    placement = Placement(torch.device("cpu"), torch.float32, four_bit=False)
    trained = load_adapter(load_model(gemma, placement), ways["full_fsdp"].folder / "adapter")
    assert isinstance(trained, PreTrainedModel)
    trained.save_pretrained(tmp_path)
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path, use_safetensors=True)
    for name, weight in ways["full"].weights.items():
        torch.testing.assert_close(whole.get_parameter(name).data, weight, rtol=1e-3, atol=1e-5)


def test_only_the_first_process_holds_the_model_before_it_is_shared(ways: dict[str, Trained], gemma: Path) -> None:
    model = load_model(gemma, Placement(torch.device("cpu"), torch.float32, four_bit=False))
    whole = sum(weight.nbytes for weight in model.parameters())
    first, second = (ways["full_fsdp"].held(rank) for rank in (0, 1))
    assert (first["loaded"], second["loaded"]) == (whole, 0)
    rows = [weight.chunk(2) for weight in model.parameters()]
    assert first["shared"] == sum(parts[0].nbytes for parts in rows)
    assert second["shared"] == sum(parts[1].nbytes for parts in rows if len(parts) > 1)


def test_a_run_on_several_gpus_goes_on_by_itself_when_one_process_is_killed(
    ways: dict[str, Trained], recipe: Recipe, tmp_path: Path
) -> None:
    warehouse, snapshot = publish(tmp_path)
    two = recipe.model_copy(update={"lora_dropout": 0.0, "max_steps": STEPS, "gpus": 2})
    killer = threading.Thread(target=kill_second_process, args=(tmp_path / ".work",), daemon=True)
    killer.start()
    log: list[str] = []
    run = train(snapshot, two, warehouse=warehouse, on_log=log.append).ref
    killer.join(timeout=1)
    assert any("rank 1 was killed by SIGKILL" in line for line in log)
    assert "going on from checkpoint-2" in log
    losses = warehouse.read_table(f"{run.folder}/metrics.parquet")["loss"].to_pylist()
    assert losses == ways["two"].losses
    adapter = load_file(warehouse.local_path(f"{run.adapter}/adapter_model.safetensors"))
    assert all(torch.equal(adapter[name], weight) for name, weight in ways["two"].weights.items())


def kill_second_process(work: Path) -> None:
    """Wait until there is a checkpoint, then kill the process with rank 1."""
    while not list(work.glob(f"*/checkpoints/*/{COMPLETE}")):
        time.sleep(0.01)
    [victim] = [child for child in psutil.Process().children() if child.environ().get("RANK") == "1"]
    victim.kill()


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.usefixtures("two_processes")
def test_a_step_has_as_many_samples_on_two_gpus(recipe: Recipe) -> None:
    config = zero3_config(recipe, torch.bfloat16)
    assert config["train_batch_size"] == recipe.batch_size * recipe.accumulation == 4
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 1)


def test_passes_that_can_not_be_shared_are_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match="accumulation: 2 forward passes a step can't be shared by 3 processes"):
        passes_per_process(recipe)


@pytest.mark.usefixtures("two_processes")
def test_deepspeed_takes_the_configuration(recipe: Recipe) -> None:
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    settings = zero.DeepSpeedZeroConfig(**zero3_config(recipe, torch.bfloat16)["zero_optimization"])
    assert settings.stage == 3
    assert settings.gather_16bit_weights_on_model_save


@pytest.mark.usefixtures("two_processes")
def test_each_layer_is_a_unit_of_fsdp(gemma: Path, recipe: Recipe) -> None:
    model = load_model(gemma, Placement(torch.device("cpu"), torch.float32, four_bit=False))
    config = trainer_arguments(recipe.model_copy(update={"sharding": "fsdp"}), model)["fsdp_config"]
    present = {type(module).__name__ for module in model.modules()}
    assert set(config["transformer_layer_cls_to_wrap"]) <= present
    assert type(model.get_decoder().layers[0]).__name__ in config["transformer_layer_cls_to_wrap"]


@pytest.mark.usefixtures("two_processes")
def test_zero3_with_recomputation_is_refused_where_layers_share_keys(gemma: Path, recipe: Recipe) -> None:
    model = load_model(gemma, Placement(torch.device("cpu"), torch.float32, four_bit=False))
    model.config.get_text_config().num_kv_shared_layers = 2
    zero3 = recipe.model_copy(update={"sharding": "zero3"})
    with pytest.raises(RecipeError, match="zero3 with layers computed again would give wrong gradients, because 2"):
        trainer_arguments(zero3, model)


@pytest.mark.usefixtures("two_processes")
def test_zero3_without_deepspeed_says_what_to_install(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.training.distributed.find_spec", lambda name: None)
    zero3 = recipe.model_copy(update={"sharding": "zero3"})
    with (
        pytest.raises(RecipeError, match=r"needs the package deepspeed\. Install it \(extra deepspeed\)"),
        loading(zero3, torch.float32),
    ):
        raise AssertionError("the model would be loaded")


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_only_what_is_trained_beside_the_language_model_may_lack_gradients(
    gemma: Path, recipe: Recipe, part: str
) -> None:
    model = load_model(gemma, Placement(torch.device("cpu"), torch.float32, four_bit=False))
    for name, weight in model.named_parameters():
        weight.requires_grad = part in name
    assert trainer_arguments(recipe, model)["ddp_find_unused_parameters"] == (part == "vision_tower")


def test_one_process_needs_no_arguments(recipe: Recipe) -> None:
    assert trainer_arguments(recipe, torch.nn.Linear(2, 2)) == {}  # type: ignore[arg-type]
