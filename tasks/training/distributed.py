"""What differs when several processes train one model: their device, the trainer's arguments, saving what is shared.

The processes come from `ranks`, torchrun or `accelerate launch`; which and how many, the environment says.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tasks.training.families import ModelError
from tasks.training.ranks import rank, world_size
from tasks.training.recipe import Recipe, RecipeError


def passes_per_process(recipe: Recipe) -> int:
    """Return the forward passes of a step that fall to each process. Raises `RecipeError` if they can't be shared."""
    if recipe.accumulation % world_size():
        raise RecipeError(
            f"accumulation: {recipe.accumulation} forward passes a step can't be shared by {world_size()} processes. "
            "Write a multiple of their number, or start as many as gpus says."
        )
    return recipe.accumulation // world_size()


def trainer_arguments(recipe: Recipe, model: PreTrainedModel) -> dict[str, Any]:
    """Return the arguments of transformers' trainer that make it share the model as the recipe says."""
    if world_size() == 1:
        return {}
    if recipe.sharding == "fsdp":
        return {"fsdp": True, "fsdp_config": fsdp_config(model)}
    if recipe.sharding == "zero3":
        _check_zero3(recipe, model)
        return {"deepspeed": zero3_config(recipe)}
    # Buffers are constants; what is trained outside the language model has no gradient in a batch without images.
    return {"ddp_broadcast_buffers": False, "ddp_find_unused_parameters": _trains_beside_decoder(model)}


def _trains_beside_decoder(model: PreTrainedModel) -> bool:
    inside = {id(weight) for weight in model.get_decoder().parameters()}
    return any(weight.requires_grad and id(weight) not in inside for weight in model.parameters())


def fsdp_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return transformers' `fsdp_config` for FSDP2: one unit a layer, checkpoints in one part a process."""
    present = {type(module).__name__ for module in model.modules()}
    layers = sorted(present & set(model._no_split_modules or ()))
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": layers,
        "reshard_after_forward": True,
        "state_dict_type": "SHARDED_STATE_DICT",
    }


def zero3_config(recipe: Recipe) -> dict[str, Any]:
    """Return DeepSpeed's configuration for ZeRO-3; "auto" is for transformers to fill in from its own arguments."""
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,  # only what is trained, when that is an adapter
        },
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": recipe.batch_size,
        "gradient_accumulation_steps": passes_per_process(recipe),
        "train_batch_size": recipe.batch_size * recipe.accumulation,
    }


def _check_zero3(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raise `RecipeError` if DeepSpeed is missing or gradients would be wrong: with LoRA it recomputes reentrantly."""
    sharing = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    if recipe.checkpointed_share != 0 and sharing:
        raise RecipeError(
            f"sharding: zero3 with layers computed again would give wrong gradients, because {sharing} layers of this "
            "model use the keys and values of others. Write sharding: fsdp, or checkpointed_share: 0."
        )
    if find_spec("deepspeed") is None:
        raise RecipeError("sharding: zero3 needs the package deepspeed. Install it (extra deepspeed), or write fsdp.")


def trained_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of trained weights in a model of `dtype`: float32, as bf16 is too coarse to add small steps to.

    DeepSpeed keeps such a copy itself and needs all weights of one dtype.
    """
    return dtype if recipe.sharding == "zero3" and world_size() > 1 else torch.float32


def prepare(trainer: Trainer, recipe: Recipe) -> None:
    """Set up what the trainer's arguments can't, and seed each process's dropout. Raises `RecipeError`.

    Call it between making the trainer and training.
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
    if trainer.is_fsdp_enabled and trainer.args.bf16:
        # Gradients of many processes are summed in 32 bits; accelerate would sum them in 16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy


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


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained weights by name, each gathered from all processes that hold a part of it, on the CPU.

    All processes must call it.
    """
    return {name: _whole(weight).cpu() for name, weight in model.named_parameters() if weight.requires_grad}


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
