"""A private run's steps in a trainer: batches that are drawn, gradients of rows, one noisy gradient a step."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from posttrain.errors import ConfigError, PosttrainError
from posttrain.mechanisms.row_gradients import RowGradients
from posttrain.privacy.canaries import GradientCanaries
from posttrain.privacy.clipping import coefficients
from posttrain.privacy.promise import Promise
from posttrain.privacy.sampling import PoissonUnits
from posttrain.privacy.step import PrivateStep, RowUnits
from posttrain.privacy.turns import ledger_of
from posttrain.run.preemption import keep_workers
from posttrain.run.private_batches import UNITS, RowsOfUnits, UnitsBeside, is_nobodys
from posttrain.run.private_checks import check_rows_apart, check_rows_reach
from posttrain.run.private_settings import units_of

# of means that are computed from private rows without noise, and are not to be published
PRIVATE = "private/"


class PrivateRun:
    """Makes a trainer's steps private. The trainer calls it at the seams of its loop, which are in `RunMixin`.

    Args:
        trainer: after its parent's constructor, with the private settings in `args.privacy`, and the plan of its steps.
            `unit_losses(model, batch)` of it gives the loss of each unit's rows.
        blank: a row of `trainer.data_collator` with nothing to learn.
        made_up: two rows of made-up tokens, of unequal lengths.

    Attributes:
        ledger: of the steps that are taken.
        step_rows: the rows that the step at hand has, over all micro-batches and ranks.
        draws: for tests: gives the units of a step of an epoch in the place of a draw.

    Raises:
        ConfigError: a model whose gradients of rows cannot be had, or are not those of the rows.
    """

    def __init__(self, trainer, blank: dict, made_up: list[dict]) -> None:
        self._trainer, self._blank, self._made_up = trainer, blank, made_up
        self.privacy, self.plan = privacy, plan = trainer.args.privacy, trainer._plan
        self._units = units_of(privacy, trainer.train_dataset)
        self.draws, self.step_rows = None, 1
        accelerator = trainer.accelerator
        # never DDP, which would add up what is not clipped
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        self.gradients = RowGradients(trainer.model)
        main = accelerator.is_main_process
        self.canaries = self._made_canaries() if privacy.audit_canaries else None
        self.step = PrivateStep(
            self.gradients.parameters,
            clip_norm=privacy.clip_norm,
            clipping=privacy.clipping,
            noise_std=plan.noise_multiplier * privacy.clip_norm if plan.noise_multiplier else 0.0,
            expected=privacy.expected_batch_size,
            adds_noise=main,
            all_reduce=accelerator.reduce if accelerator.num_processes > 1 else None,
            witness=self.canaries,
        )
        self.ledger = ledger_of(
            plan.kind,
            target_epsilon=privacy.target_epsilon,
            delta=privacy.target_delta,
            accountant=privacy.accountant,
            neighbours=privacy.neighbours,
            data=None if trainer.train_dataset is None else trainer._identity()["data"],
            writes=main,
        )
        self._synced = self._reached = self._together = False
        self._loss: Tensor | None = None
        check_rows_apart(trainer, self.gradients, self._collated)
        check_rows_reach(trainer, self.gradients, self._collated)

    def _made_canaries(self) -> GradientCanaries:
        values = sum(parameter.numel() for parameter in self.gradients.parameters.values())
        privacy = self.privacy
        return GradientCanaries(
            privacy.audit_canaries,
            values,
            noise_multiplier=self.plan.noise_multiplier,
            rate=self.plan.rate,
            clip_norm=privacy.clip_norm,
            coefficient=lambda norms: coefficients(norms, privacy.clip_norm, privacy.clipping),
        )

    def _collated(self, rows: list[int]) -> tuple[dict, RowUnits]:
        """Return a batch of some of the made-up rows on the device, and their units, which are their numbers."""
        trainer = self._trainer
        batch = UnitsBeside(trainer.data_collator, self._blank)([(self._made_up[row], row) for row in rows])
        units = batch.pop(UNITS)
        return trainer._prepare_inputs(batch), units

    def made_up_batch(self) -> dict:
        """Return the made-up rows as one batch on the device."""
        return self._collated([0, 1])[0]

    def dataloader(self) -> DataLoader:
        """Return the batches of an epoch on this rank: as many a step as the plan says, some of them without rows."""
        trainer, args, plan = self._trainer, self._trainer.args, self.plan
        sampler = PoissonUnits(
            self._units,
            rate=plan.rate,
            cap=plan.cap,
            rows_per_unit=self.privacy.rows_per_unit,
            micro_batch_size=args.per_device_train_batch_size,
            micro_batches=plan.micro_batches,
            steps=plan.steps_an_epoch,
            rank=trainer.accelerator.process_index,
            ranks=trainer.accelerator.num_processes,
            source=self.draws,
        )
        rows = trainer._remove_unused_columns(trainer.train_dataset, description="training")
        workers = args.dataloader_num_workers
        loader = DataLoader(
            RowsOfUnits(rows),
            batch_sampler=sampler,
            collate_fn=UnitsBeside(trainer.data_collator, self._blank),
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        )
        return keep_workers(loader)

    def begin(self, checkpoint: Path | None) -> None:
        """Open the ledger of a training; all ranks call it.

        Raises:
            ConfigError: a second training of one trainer, whose weights come from the first one's steps as well; and as
                `Ledger.begin` does, on every rank.
        """
        trainer, problem = self._trainer, None
        if checkpoint is None and self.ledger.lineage:
            raise ConfigError(
                f"this trainer has taken {sum(entry.steps for entry in self.ledger.lineage)} private steps already, "
                "and its noise was solved for one training. To go on, resume from its checkpoint; to begin anew, make "
                "another trainer."
            )
        # of a micro-batch that was interrupted
        self.gradients.take()
        folder = Path(trainer.args.output_dir) if trainer._has_folder else None
        try:
            self.ledger.begin(folder, self.plan.steps, checkpoint, strict=trainer.args.check_resume)
        except PosttrainError as error:
            problem = error
        if trainer.accelerator.num_processes > 1:
            told = [None if problem is None else (type(problem), str(problem))]
            broadcast_object_list(told)
            problem = problem or (told[0] and told[0][0](told[0][1]))
        if problem:
            raise problem
        self._synced = self._reached = False
        self.step.begin()

    def begin_step(self) -> None:
        """Begin a step; before a training's first, do what needs the model in its place."""
        self._loss = None
        if not self._synced:
            self._synced = True
            self.sync_weights()
            self._together = ranks_forward_together(self._trainer)
            self._foresee()

    def end(self) -> None:
        """End a training, whether it is whole or not."""
        self.ledger.settle()

    def sync_weights(self) -> None:
        """Give every rank rank 0's adapter, as DDP would have done."""
        if self._trainer.accelerator.num_processes > 1:
            with torch.no_grad():
                for parameter in self.gradients.parameters.values():
                    parameter.copy_(broadcast(parameter.detach().clone(), from_process=0))

    def micro_batch(self, inputs: dict, train: Callable[[], Tensor]) -> Tensor:
        """Run forward and backward of a micro-batch by `train`, take its gradients of rows, and return its loss.

        One without rows is not run, unless it is its step's first, which gives every mean its name, or other ranks
        would wait in their forward.
        """
        if self._loss is not None and is_nobodys(inputs) and not self._together:
            return torch.zeros_like(self._loss)
        if not self._reached and self._trainer.args.gradient_checkpointing:
            # which is switched on when training begins
            self._reached = True
            check_rows_reach(self._trainer, self.gradients, self._collated)
        with self.gradients.collected(len(inputs["input_ids"])):
            loss = train()
        # the mean over the step's rows, once the Trainer has added up micro-batches and averaged ranks
        self._loss = loss * self._trainer.accelerator.num_processes / max(self.step_rows, 1)
        self.step.collect(self.gradients.take_together(), inputs[UNITS])
        return self._loss

    def finish_step(self) -> None:
        """Write the noisy gradient of the step, once the step is written into the ledger; all ranks call it."""
        trainer = self._trainer
        self.ledger.take()
        found = self.step.finish()
        means, once = trainer._means["train"], int(trainer.accelerator.is_main_process)
        means.add_sum(f"{PRIVATE}units", torch.full((), float(found.units)), once)
        means.add_sum(f"{PRIVATE}clipped_fraction", found.clipped, found.units)
        means.add_sum(f"{PRIVATE}gradient_norm", found.norms, found.units)
        means.add_sum(f"{PRIVATE}rows_not_finite", found.bad_rows, once)

    def figures(self) -> dict[str, float]:
        """Return what may be told of the run so far, by name, for the log."""
        if not self.privacy.is_private:
            return {}
        spent = self.ledger.spent() if self._trainer.accelerator.is_main_process else math.nan
        self._foresee()
        return {"privacy/epsilon": spent, "privacy/delta": self.privacy.target_delta}

    def _foresee(self) -> None:
        """Have the figures of the next log computed while steps run, on the rank that tells them."""
        if self.privacy.is_private and self._trainer.accelerator.is_main_process:
            steps = steps_to_log(self._trainer, self.plan.steps_an_epoch)
            if steps:
                self.ledger.foresee(steps)

    def promise(self) -> Promise:
        """Return what the run promises, and has spent."""
        found = None
        if self.canaries is not None and self.canaries.steps:
            found = self.canaries.result(self.privacy.target_delta)
        return Promise.of(self.privacy, self.ledger, found)

    def state(self) -> dict:
        """Return what a checkpoint keeps: the ledger and the canaries. Neither noise nor draws."""
        return {"ledger": self.ledger.state()} | ({} if self.canaries is None else {"canaries": self.canaries.state()})

    def load(self, state: dict) -> None:
        """Take over what `state` returned when the checkpoint was written; ConfigError where there is nothing."""
        self.ledger.load(state.get("ledger") or {})
        if self.canaries is not None:
            self.canaries.load(state.get("canaries") or {})


def ranks_forward_together(trainer) -> bool:
    """Return whether forwards of several ranks wait for each other, as where weights are spread over them."""
    accelerator = trainer.accelerator
    if accelerator.num_processes == 1:
        return False
    spread = trainer.is_distributed_loading_by_transformers or getattr(accelerator, "parallelism_config", None)
    spread = spread or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return bool(spread) or any(isinstance(weight, DTensor) for weight in trainer.model.parameters())


def steps_to_log(trainer, steps_an_epoch: int) -> int:
    """Return how many steps from here the next log is due by the settings; 0 where none is."""
    args, state = trainer.args, trainer.state
    strategy, done = str(getattr(args.logging_strategy, "value", args.logging_strategy)), state.global_step
    if strategy == "no":
        return 0
    every = steps_an_epoch if strategy == "epoch" else state.logging_steps
    steps = 1 if args.logging_first_step and not done else every - done % every
    return steps if done + steps <= state.max_steps else 0
