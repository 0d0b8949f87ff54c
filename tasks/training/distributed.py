"""What differs when several processes train one model: their device, the trainer's arguments, saving what is shared.

The processes come from `ranks`, torchrun or `accelerate launch`; which and how many, the environment says.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from tasks.training.families import ModelError
from tasks.training.ranks import is_first, rank, world_size
from tasks.training.recipe import Recipe, RecipeError
from tasks.training.sharding import share_out


def passes_per_process(recipe: Recipe) -> int:
    """Return the forward passes of a step that fall to each process. Raises `RecipeError` if they can't be shared."""
    if recipe.accumulation % world_size():
        raise RecipeError(
            f"accumulation: {recipe.accumulation} forward passes a step can't be shared by {world_size()} processes. "
            "Write a multiple of their number, or start as many as gpus says."
        )
    return recipe.accumulation // world_size()


@contextmanager
def loading(recipe: Recipe, dtype: torch.dtype) -> Iterator[None]:
    """A context in which a model of `dtype` is loaded and made trainable: for ZeRO-3, each process gets its part.

    Transformers then has DeepSpeed divide each weight as soon as it exists. Raises `RecipeError`.
    """
    if recipe.sharding != "zero3" or world_size() == 1:
        yield
        return
    _check_deepspeed()
    import deepspeed  # an extra that few install

    deepspeed.init_distributed()
    config = HfDeepSpeedConfig(zero3_config(recipe, dtype))  # in force for as long as it is referred to
    yield
    del config


def trainer_arguments(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of transformers' trainer that make it share the model as the recipe says."""
    if world_size() == 1:
        return {}
    if recipe.sharding == "fsdp":
        return {"fsdp": True, "fsdp_config": fsdp_config(model)}
    if recipe.sharding == "zero3":
        _check_zero3(recipe, model)
        return {"deepspeed": zero3_config(recipe, model.dtype)}
    # Buffers are constants; what is trained outside the language model has no gradient in a batch without images.
    return {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": _trains_beside_decoder(model)}


def _trains_beside_decoder(model: PreTrainedModel) -> bool:
    inside = {id(weight) for weight in model.get_decoder().parameters()}
    return any(weight.requires_grad and id(weight) not in inside for weight in model.parameters())


def fsdp_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return transformers' `fsdp_config` for FSDP2: one unit a layer, checkpoints in one part a process."""
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": layer_classes(model),
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
    }


def layer_classes(model: PreTrainedModel) -> list[str]:
    """Return the names of the classes of the layers that FSDP2 gathers one at a time."""
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(model._no_split_modules or ()))


def zero3_config(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's configuration for ZeRO-3 of a model of `dtype`."""
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,  # only what is trained, when that is an adapter
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "gradient_clipping": recipe.max_grad_norm,
        "train_micro_batch_size_per_gpu": recipe.batch_size,
        "gradient_accumulation_steps": passes_per_process(recipe),
        "train_batch_size": recipe.batch_size * recipe.accumulation,
    }


def _check_zero3(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raise `RecipeError` if gradients would be wrong, because with DeepSpeed layers are recomputed reentrantly."""
    sharing = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    if recipe.checkpointed_share != 0 and sharing:
        raise RecipeError(
            f"sharding: zero3 with layers computed again would give wrong gradients, because {sharing} layers of this "
            "model use the keys and values of others. Write sharding: fsdp, or checkpointed_share: 0."
        )


def _check_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        raise RecipeError("sharding: zero3 needs the package deepspeed. Install it (extra deepspeed), or write fsdp.")


def prepare(trainer: Trainer, recipe: Recipe, *, loaded_whole: bool) -> None:
    """Set up what the trainer's arguments can't, and seed each process's dropout. Raises `RecipeError`.

    Call it between making the trainer and training. Unless the model is `loaded_whole` it is shared out here.
    """
    if world_size() == 1:
        return
    torch.manual_seed(recipe.seed + rank())  # else all processes would drop the same places
    shared = {"fsdp": trainer.is_fsdp_enabled, "zero3": trainer.is_deepspeed_enabled}
    if recipe.sharding != "none" and not shared[recipe.sharding]:
        raise RecipeError(f"sharding: {recipe.sharding} works on GPUs only. Write sharding: none, or train on GPUs.")
    # Our order repeats no samples to fill a last batch; accelerate thinks it does and would leave some uncounted.
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather
    if trainer.is_fsdp_enabled:
        trainer.add_callback(CheckSharded())
        # Between the passes of a step it would keep every process's own gradients, whole and in 32 bits.
        trainer.accelerator.no_sync = lambda model: nullcontext()  # type: ignore[method-assign]
    if trainer.is_fsdp_enabled and trainer.args.bf16:
        # Gradients of many processes are summed in 32 bits; accelerate would sum them in 16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if trainer.is_fsdp_enabled and not loaded_whole:
        share_out(cast(Any, trainer.model), trainer.accelerator, trained=torch.float32)


class CheckSharded(TrainerCallback):
    """Ends a training before its first step if what should be shared is not; see `check_sharded`."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Check the model that FSDP2 has made of ours."""
        assert model is not None
        check_sharded(model)


def check_sharded(model: nn.Module) -> None:
    """Raise `ModelError` unless every weight is divided among the processes.

    Weights whose dtype can't be divided, such as 4-bit ones packed into bytes, accelerate leaves whole on each GPU.
    """
    weights = dict(model.named_parameters())
    whole = [name for name, weight in weights.items() if not isinstance(weight, DTensor)]
    if whole:
        raise ModelError(
            f"sharding: {len(whole)} of {len(weights)} weights are whole in every process: {', '.join(whole[:5])}. "
            "Load 4-bit weights packed into the model's dtype, or write sharding: none."
        )


def trained_count(model: nn.Module) -> int:
    """Return how many weights get gradients, wherever their parts lie."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in model.parameters() if weight.requires_grad)


def whole_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the trained weights by name, in `dtype` and on the CPU, gathered from all that hold a part of them.

    All processes must call it; only the first gets them, so that the machine holds one copy.
    """
    found = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            whole = _whole(weight)
            if is_first():
                found[name] = whole.to("cpu", dtype, copy=True)  # what was gathered may be part of something larger
    return found


def _whole(weight: torch.nn.Parameter) -> torch.Tensor:
    if isinstance(weight, DTensor):
        return weight.full_tensor().detach()
    if hasattr(weight, "ds_id"):
        # an extra that few install
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([weight]):
            return weight.detach().clone()
    return weight.detach()


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def of_all(value: Any) -> list[Any]:
    """Return `value` of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def leave() -> None:
    """Take leave of the other processes when all is done."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
