"""Clients of one process: each is trained by a trainer of its own on the one model in memory, one after the other."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from posttrain.checks import shorten
from posttrain.errors import ConfigError, DivergedError
from posttrain.federated.adapter import SharedAdapter
from posttrain.federated.config import FederatedConfig
from posttrain.federated.given import check_clients, processes
from posttrain.federated.methods import Shared
from posttrain.federated.replies import Reply
from posttrain.mechanisms.as_found import collected_alone, left_as_found
from posttrain.mechanisms.base_digests import base_digests
from posttrain.run.mixin import without_folder
from posttrain.visible import listed


class Task(NamedTuple):
    """What a client is asked to do.

    Attributes:
        client: its id. round: from 1. seed: of all that it draws, by the run's seed, its id and the round.
        shared: what it begins with.
    """

    client: str
    round: int
    seed: int
    shared: Shared


class TrainerClients:
    """Trains clients with trainers of this library, or TRL's, that leave no folder, card or report.

    All use the one base in memory: a client's turn begins by copying the shared factors into the model. Its optimizer
    is new in each round. Its rows are tokenised once: the next round's trainer is given what the first one made of
    them, except where it packs.

    Args:
        model: a `PeftModel` with one plain LoRA.
        rows: of each client, as `partitions.split` returns them.
        build: `build(model, rows, seed)` makes the trainer of a client's turn: it gives the model on as it is, without
            a peft_config, and seed as the trainer's `seed`, so that a run that goes on draws the same. Its `max_steps`
            or `num_train_epochs` are the local steps; `save_strategy` is `no`.

    Raises:
        ConfigError: another kind of model or adapter, or several processes.
    """

    def __init__(self, model, rows: Mapping, build: Callable, config: FederatedConfig) -> None:
        check_clients(rows, build, config)
        if (count := processes()) > 1:
            raise ConfigError(
                f"WORLD_SIZE is {count}: clients of one process take turns on its model. Start one "
                "process, without accelerate launch or torchrun."
            )
        self.adapter = SharedAdapter(model, config)
        # before a turn moves the base
        self._base = base_digests(model)
        self.rows, self._build = {name: len(held) for name, held in rows.items()}, build
        self._held, self._is_tokenised, self._rounds = dict(rows), set(), config.rounds

    @property
    def start(self) -> Shared:
        """What clients begin the first round with."""
        return self.adapter.start

    def identity(self) -> dict[str, str]:
        """Return what tells the base model that the run began with."""
        return self._base

    def save(self, folder: str | Path, shared: Shared) -> None:
        """Write the adapter of a run as a plain LoRA; see `SharedAdapter.save`."""
        self.adapter.save(folder, shared)

    def __call__(self, task: Task) -> Reply:
        """Train a client's turn and return what it sends back; a training that diverges is a reply with a fault."""
        with collected_alone():
            return self._turn(task)

    def _turn(self, task: Task) -> Reply:
        from transformers import set_seed

        if task.client not in self._held:
            raise ConfigError(f"there is no client {shorten(task.client)}; found {listed(sorted(self._held))}.")
        model = self.adapter.model
        self.adapter.load(task.shared)
        self.adapter.freeze()
        set_seed(task.seed)
        with left_as_found(model), without_folder():
            trainer = self._build(model, self._held[task.client], task.seed)
            self._check(trainer, task.client)
            self.adapter.check_unchanged(task.client, task.shared, "AB")
            try:
                found = trainer.train()
            except DivergedError as error:
                return Reply(task.client, fault=f"its training diverged: {error}")
            self._keep_tokens(trainer, task.client)
        if not self.adapter.trains_a:
            self.adapter.check_unchanged(task.client, task.shared, "A")
        A, B = self.adapter.read()
        loss = found.training_loss
        told = {} if math.isfinite(loss) else {"fault": f"its training loss is {loss}"}
        return Reply(task.client, self.rows[task.client], B, A, {"loss": loss, "steps": found.global_step}, **told)

    def _check(self, trainer, client: str) -> None:
        from transformers import Trainer

        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"build returned {shorten(trainer)} for client {client}; it must return a trainer of this library or "
                "TRL."
            )
        model, args = self.adapter.model, trainer.args
        if trainer.accelerator.unwrap_model(trainer.model) is not model:
            raise ConfigError(
                f"the trainer of client {client} has another model than it was given; build it on that one, without a "
                "peft_config."
            )
        if len(model.peft_config) != 1:
            raise ConfigError(
                f"the trainer of client {client} put a second adapter beside the shared one "
                f"({', '.join(model.peft_config)}), as trainers with a reference do: it would be what the round began "
                "with, and not the model that the run began with. Give it a reference model, or use a trainer without."
            )
        self.adapter.check_frozen(client)
        privacy = getattr(args, "privacy", None)
        solved = privacy is not None and privacy.is_private and privacy.target_epsilon is not None
        if self._rounds > 1 and solved:
            raise ConfigError(
                f"the trainer of client {client} solves its noise from target_epsilon {privacy.target_epsilon:g}, for "
                f"one turn, and rounds is {self._rounds}: with each turn the client would spend it again. Give "
                "noise_multiplier, and have the steps of all of a client's turns counted."
            )
        if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no" or args.push_to_hub:
            raise ConfigError(
                f"the trainer of client {client} saves or pushes by itself (save_strategy, push_to_hub). Set "
                "`save_strategy: no` and leave push_to_hub out: the run saves what clients share."
            )
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ConfigError(
                f"the trainer of client {client} runs under DeepSpeed or FSDP, and clients of one process share one "
                "whole model. Leave it out."
            )

    def _keep_tokens(self, trainer, client: str) -> None:
        if client in self._is_tokenised or getattr(trainer.args, "packing", False):
            return
        self._is_tokenised.add(client)
        rows = trainer.train_dataset
        if hasattr(rows, "__len__"):
            self._held[client] = rows
