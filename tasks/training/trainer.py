"""TRL's trainer with steps that go on in smaller pieces when memory runs out, and end at a loss that is no number."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, seed_worker
from trl.trainer.sft_trainer import SFTTrainer

from tasks.training.batches import StartEpochs, TokenBatches
from tasks.training.child_side import StartAgain
from tasks.training.collate import IGNORED
from tasks.training.divergence import Diverged
from tasks.training.optimizer import RatesByPart, has_waited_enough
from tasks.training.order import Order
from tasks.training.out_of_memory import REMEDY, Batch, CutCollator, Inputs, OutOfMemory, Pieces, Row, is_out_of_memory
from tasks.training.recipe import Recipe


class Trainer(RatesByPart, SFTTrainer):
    """SFTTrainer that takes samples in `order`, computes batches in `pieces`, and logs what its user watches.

    Parts of the model learn at the rates of `recipe`. `order` gives single rows, or batches of uneven size.

    The loss is the mean over the supervised tokens of a step's samples, so neither accumulation nor cutting changes
    it. When memory runs out, the step under way is done again from its start with batches in twice as many pieces.
    One of several processes can't repeat a step alone: it raises `StartAgain`, and all go on from the last checkpoint.
    Raises `OutOfMemory` when a single sample does not fit, and `Diverged` before anything is saved after a step whose
    loss or gradients are not finite. Each step's log has, beside TRL's: samples, tokens, micro_batch (most samples in
    one forward pass) and input_wait_seconds.
    """

    def __init__(
        self,
        *,
        collator: Callable[[list[Row]], Inputs],
        order: Order | TokenBatches,
        pieces: Pieces,
        recipe: Recipe,
        **options: Any,
    ) -> None:
        self.order, self.pieces, self.recipe = order, pieces, recipe
        self.cut_collator = CutCollator(collator, pieces)
        super().__init__(data_collator=self.cut_collator, **options)
        # Whether or not the model's own loss takes it: transformers counts the step's tokens, and TRL divides by them.
        self.model_accepts_loss_kwargs = True
        if isinstance(order, TokenBatches):
            self.add_callback(StartEpochs(order))
        self._batches: list[Batch] = []  # those of this step whose gradients were added
        self._counts: dict[str, float] = {}
        self._forget_passes()

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Order:
        assert isinstance(self.order, Order)
        return self.order

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process's share of the batches; a resumed training goes on with the next."""
        if isinstance(self.order, Order):
            loader: DataLoader[Any] = super().get_train_dataloader()
            return loader
        assert isinstance(self.train_dataset, Dataset)
        workers = self.args.dataloader_num_workers
        plain = DataLoader(
            self.train_dataset,  # type: ignore[arg-type] # map-style, as torch wants it
            batch_sampler=self.order,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(plain)
        return prepared

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the loader of held-out batches, which are not cut: nothing is kept of them for a backward pass."""
        self.data_collator = self.cut_collator.collator
        try:
            loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = self.cut_collator
        return loader

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Go through the samples, unless the training ended with the checkpoint that this process started from."""
        if self.state.global_step >= self.state.max_steps or has_waited_enough(self.callback_handler.callbacks):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Fetch the batches of a step, and count its samples, its tokens and the time that went by waiting for it."""
        started = time.monotonic()
        batches = list(islice(epoch_iterator, num_batches))
        waited = time.monotonic() - started
        pieces = [piece for batch in batches for piece in batch["pieces"]]
        self._batches = []
        self._forget_passes()
        self._counts = {
            "samples": self._over_processes(sum(len(ids) for batch in batches for ids in batch["sample_ids"])),
            "tokens": self._over_processes(torch.stack([piece["attention_mask"].sum() for piece in pieces]).sum()),
            "input_wait_seconds": waited,
        }
        return batches, self._get_num_items_in_batch(pieces, device)

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Add the gradients of a batch and return its share of the step's loss."""
        self._batches.append(self._cut_again(inputs))
        loss = self._add_gradients(model, self._batches[-1], num_items_in_batch)
        while loss is None:
            self._make_room(model)
            self._batches = [self._cut_again(batch) for batch in self._batches]
            for batch in self._batches:
                loss = self._add_gradients(model, batch, num_items_in_batch)
                if loss is None:
                    break
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Compute a piece's share of the step's loss, and remember it."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            self._losses.append((loss[0] if return_outputs else loss).detach())
            self._supervised.append((inputs["labels"][:, 1:] != IGNORED).sum())
        return loss

    def evaluation_loop(self, *args: Any, **options: Any) -> EvalLoopOutput:
        """Compute the loss on held-out rows: the mean over their supervised tokens, however they are batched.

        transformers would average the batches' means, and count the rows that fill up the processes' last batches.
        """
        self._held_out_batches = 0
        self._held_out = torch.zeros(2, device=self.args.device)
        output = super().evaluation_loop(*args, **options)
        loss, supervised = self.accelerator.reduce(self._held_out).tolist()
        return output._replace(metrics={**(output.metrics or {}), "eval_loss": loss / supervised})

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Inputs,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Compute the loss of a held-out batch, and add it up without rows that another process has too."""
        assert isinstance(self.eval_dataset, Dataset)
        before = (self._held_out_batches * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
        own = len(self.eval_dataset) - before
        self._held_out_batches += 1
        labels = inputs["labels"].clone()
        labels[max(own, 1) :] = IGNORED  # one row is left, for a loss without any is no number
        inputs = {**inputs, "labels": labels}
        loss, logits, kept = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if own > 0:
            supervised = (labels[:, 1:] != IGNORED).sum()
            self._held_out += torch.stack([loss * supervised, supervised])
        return loss, logits, kept

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step's figures as those of the whole step. Raises `Diverged`."""
        if "loss" in logs:
            self._check_finite(logs)
            self._weigh_metrics()
            logs.update(self._counts, micro_batch=max(map(len, self._piece_ids)))
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not counted: transformers' formula knows neither frozen weights nor images."""
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save. The folder exists first: transformers takes it for the best checkpoint only if it does.

        With FSDP2 it would come to be by whichever process is ahead, and the others would restore other weights.
        """
        assert self.args.output_dir is not None
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        Path(self.args.output_dir, name).mkdir(parents=True, exist_ok=True)
        super()._save_checkpoint(model, trial)

    def _add_gradients(
        self, model: nn.Module, batch: Batch, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor | None:
        """Run forward and backward piece by piece; return the batch's share of the loss, or None if out of memory."""
        losses = []
        try:
            for at, (piece, ids) in enumerate(zip(batch["pieces"], batch["sample_ids"], strict=True), start=1):
                self._piece_ids.append(ids)
                with self._gradients_kept(model, synchronized=at == len(batch["pieces"])):
                    losses.append(super().training_step(model, piece, num_items_in_batch))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None  # only now, with the traceback gone, can the activations it refers to be freed
        return torch.stack(losses).sum()

    @contextmanager
    def _gradients_kept(self, model: nn.Module, *, synchronized: bool) -> Iterator[None]:
        """Keep processes from exchanging gradients after a piece that another of the same batch follows."""
        if synchronized:
            yield
            return
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model=model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _make_room(self, model: nn.Module) -> None:
        """Drop what the step has so far and halve what is computed at once. Raises `OutOfMemory` if that can't help."""
        failed = self._piece_ids[-1]
        step = self.state.global_step + 1
        if len(failed) == 1:
            raise OutOfMemory(f"out of memory in step {step} with sample {failed[0]} alone. {REMEDY}")
        self.pieces.double(step=step, samples=len(failed))
        if self.args.world_size > 1:  # the others wait for this process's gradients: they can't start the step again
            raise StartAgain(
                f"out of memory in step {step} on one of {self.args.world_size} processes: all go on from the last "
                f"checkpoint, with batches in {self.pieces.count} pieces"
            )
        model.zero_grad()
        self._forget_passes()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _forget_passes(self) -> None:
        """Start a step's figures anew."""
        self._piece_ids: list[list[str]] = []
        self._losses: list[torch.Tensor] = []
        self._supervised: list[torch.Tensor] = []
        self._metrics["train"].clear()

    def _cut_again(self, batch: Batch) -> Batch:
        """Return the batch cut as it is to be now: the same one, unless memory ran out since it was collated."""
        ids = list(chain.from_iterable(batch["sample_ids"]))
        if len(batch["pieces"]) == min(self.pieces.count, len(ids)):
            return batch
        return self.cut_collator(self._rows(ids))

    def _rows(self, ids: Sequence[str]) -> list[Row]:
        """Return the samples with these ids; a search through all ids, but only after memory ran out."""
        assert isinstance(self.train_dataset, Dataset)
        wanted = set(ids)
        found = {sample: at for at, sample in enumerate(self.train_dataset["sample_id"]) if sample in wanted}
        return [self.train_dataset[found[sample]] for sample in ids]

    def _check_finite(self, logs: dict[str, float]) -> None:
        step = self.state.global_step
        finite = torch.isfinite(torch.stack(self._losses)).tolist()
        bad = [ids for ids, is_finite in zip(self._piece_ids, finite, strict=True) if not is_finite]
        if bad:
            raise Diverged("the loss is not finite", step=step, sample_ids=list(chain.from_iterable(bad)))
        if not math.isfinite(logs["grad_norm"]):
            ids = list(chain.from_iterable(self._piece_ids))
            raise Diverged(f"the gradient norm is {logs['grad_norm']}", step=step, sample_ids=ids)

    def _weigh_metrics(self) -> None:
        """Make the step's means over forward passes, TRL's, means over supervised tokens."""
        weights = [self._over_processes(count) for count in self._supervised]
        for name, values in self._metrics["train"].items():
            if len(values) == len(weights):
                total = sum(value * weight for value, weight in zip(values, weights, strict=True))
                self._metrics["train"][name] = [total / max(sum(weights), 1)]

    def _over_processes(self, count: int | torch.Tensor) -> int:
        return int(self.accelerator.reduce(torch.as_tensor(count, device=self.args.device), "sum"))
