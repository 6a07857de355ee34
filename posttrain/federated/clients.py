"""Clients of one process: each is trained by a trainer of its own on the one model in memory, one after the other."""

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from posttrain.checks import shorten
from posttrain.errors import ConfigError, DataError, DivergedError
from posttrain.federated.adapter import SharedAdapter
from posttrain.federated.config import FederatedConfig
from posttrain.federated.given import check_clients, processes
from posttrain.federated.methods import Shared
from posttrain.federated.replies import Reply
from posttrain.federated.spending import folder_name, is_private, metrics_of
from posttrain.mechanisms.as_found import collected_alone, left_as_found
from posttrain.mechanisms.base_digests import base_digests
from posttrain.privacy import turns
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
        ledgers: where the ledger of each client that trains privately is, in a folder of its own; None for a temporary
            folder, which ends with this object, so that a run that goes on would know nothing of what was spent.

    Raises:
        ConfigError: another kind of model or adapter, or several processes.
    """

    def __init__(
        self, model, rows: Mapping, build: Callable, config: FederatedConfig, ledgers: str | Path | None = None
    ) -> None:
        check_clients(rows, build, config, ledgers)
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
        self._ledgers = Path(tempfile.mkdtemp(prefix="posttrain-") if ledgers is None else ledgers)
        # whether a private client without `ledgers` is refused, as this object ends before the run does
        self.needs_ledgers, self._is_kept = False, ledgers is not None
        if ledgers is None:
            weakref.finalize(self, shutil.rmtree, self._ledgers, ignore_errors=True)

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
        with left_as_found(model), without_folder(), self._spending(task.client):
            trainer = self._built(task)
            self._check(trainer, task.client)
            self.adapter.check_unchanged(task.client, task.shared, "AB")
            try:
                found = trainer.train()
            except turns.SpentError as error:
                return Reply(task.client, fault=str(error))
            except DivergedError as error:
                # which may tell a loss
                why = "" if is_private(trainer) else f": {error}"
                return Reply(task.client, fault=f"its training diverged{why}")
            self._keep_tokens(trainer, task.client)
        if not self.adapter.trains_a:
            self.adapter.check_unchanged(task.client, task.shared, "A")
        A, B = self.adapter.read()
        metrics = metrics_of(trainer, found)
        loss = metrics.get("loss", 0.0)
        told = {} if math.isfinite(loss) else {"fault": f"its training loss is {loss}"}
        return Reply(task.client, self.rows[task.client], B, A, metrics, **told)

    def _spending(self, client: str):
        """Let what is trained inside be a turn of a client, whose ledger adds up those of all rounds."""
        return turns.of_client(self._ledgers / folder_name(client), self._rounds)

    def _built(self, task: Task):
        try:
            return self._build(self.adapter.model, self._held[task.client], task.seed)
        except (ConfigError, DataError) as error:
            # of many clients, whose rows are what it is about
            kind = ConfigError if isinstance(error, ConfigError) else DataError
            raise kind(f"the trainer of client {task.client} cannot be made: {error}") from error

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
        if is_private(trainer) and self.needs_ledgers and not self._is_kept:
            raise ConfigError(
                f"client {client} trains privately, and nothing keeps what it spent: its next turn would know nothing "
                "of this one. Give TrainerClients `ledgers`, a folder on the client's own disk; in the app that "
                "`posttrain federated init` writes it is `ledgers` of --node-config."
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
