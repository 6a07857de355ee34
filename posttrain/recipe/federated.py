"""What the recipe of federated training does around its rounds: clients' rows, model, evaluation, adapter, report."""

import contextlib
import dataclasses
import functools
import shutil
from collections import Counter
from pathlib import Path

from posttrain import recipe
from posttrain.config import DataArguments
from posttrain.config.setting import identity_of
from posttrain.console import say
from posttrain.errors import ConfigError, DataError
from posttrain.federated import curves, partitions
from posttrain.federated.config import FederatedConfig
from posttrain.federated.given import processes
from posttrain.federated.rounds import REPORTS
from posttrain.log import get_logger
from posttrain.private import hide
from posttrain.recipe import dry_run, federated_card, instructions
from posttrain.recipe.federated_turns import Evaluation, builder, load_model
from posttrain.visible import visible

ADAPTER, LEDGERS, CURVES = "adapter", "ledgers", "curves.png"
# of upstream's settings, those by which a turn trains
_UPDATE = (
    *("learning_rate", "optim", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size"),
    *("weight_decay", "max_grad_norm", "max_length", "seed"),
)
# settings of one trainer's run: values that a run of rounds may have, and why no other
_REFUSED = (
    (
        "push_to_hub",
        (False,),
        "is of a trainer's own run. Push the adapter in the end: posttrain push FOLDER/adapter REPO",
    ),
    ("overwrite", (False,), "would replace rounds, and what clients have spent. Choose another output_dir"),
    ("load_best_model_at_end", (False,), "chooses among checkpoints of one trainer. Leave it out"),
    (
        "max_minutes",
        (None,),
        "ends one trainer's run. Leave it out: a killed run goes on with resume_from_checkpoint: auto",
    ),
    ("resume_from_checkpoint", (None, False, "auto"), "is of a trainer's own run. Set it to auto"),
    ("refactor_every", (0, None), "is of the steps of a turn. Use refactor_every_rounds"),
)


def load(data_args: DataArguments, args, config: FederatedConfig):
    """Load the rows of each client by its id, and those for evaluation, which are nobody's, or None.

    Args:
        args: of the clients' trainer. config: how rows are split.

    Raises:
        ConfigError, DataError: settings that no run of rounds has; rows that cannot be split so.
    """
    from posttrain.data.instructions.loading import load_instructions
    from posttrain.run.private_settings import columns_beside

    _check_settings(args)
    column, units = config.partition_column, columns_beside(args.privacy)
    load = functools.partial(load_instructions, beside=tuple(dict.fromkeys([*units, *([column] if column else [])])))
    rows, held_out = recipe.load_splits(load, data_args, args.eval_strategy != "no", args.seed)
    clients = partitions.split(rows, config)
    _warn_of_units_at_several(clients, args.privacy)
    if column is not None and column not in units:
        clients = {name: held.remove_columns(column) for name, held in clients.items()}
        held_out = held_out.remove_columns(column) if held_out and column in held_out.column_names else held_out
    return clients, held_out


def _warn_of_units_at_several(clients: dict, privacy) -> None:
    """Warn of units of privacy that several clients have: each client's promise is for its own rows of them."""
    column = None if privacy is None or not privacy.is_private else privacy.privacy_unit_column
    if column is None:
        return
    at = Counter(unit for held in clients.values() for unit in {str(value) for value in held[column]})
    several = sum(count > 1 for count in at.values())
    if several:
        get_logger().warning(
            "%d of %d values of %s have rows at several clients, and what each client promises them adds up. Split the "
            "rows so that each is at one client: `partition: given`, with a partition_column that follows from %s.",
            several, len(at), column, column,
        )  # fmt: skip


def _check_settings(args) -> None:
    for name, neutral, why in _REFUSED:
        if getattr(args, name) not in neutral:
            raise ConfigError(f"{name} is {getattr(args, name)!r}, which {why}.")
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(args.model_settings, name):
            raise ConfigError(f"{name} is true, and clients share a base that is not quantised. Leave {name} out.")
    if (count := processes()) > 1:
        raise ConfigError(
            f"the run was launched on {count} processes, and clients take turns on one model in one. Launch one: "
            "--launch cpu, or single_gpu."
        )


def prepare(model_id: str, args, config: FederatedConfig, clients: dict, peft_config, held_out=None) -> dict:
    """Check settings, adapter and rows before the model loads; returns the plan of each private client by its id.

    Raises:
        ConfigError, DataError, EnvironmentIssue: what a turn of a client would be refused for.
    """
    from datasets import concatenate_datasets

    from posttrain.adapters import lora_settings
    from posttrain.data.processing import processing_class_for
    from posttrain.trainers.sft import prepare

    if peft_config is None:
        raise ConfigError("adapter is none; clients train one LoRA. Set `use_peft: true`.")
    refused = lora_settings.refusals(peft_config.to_dict())
    if hasattr(peft_config, "scheme") or refused:
        why = f"it is one of the scheme {peft_config.scheme}" if hasattr(peft_config, "scheme") else refused[0]
        raise ConfigError(f"the adapter is no plain LoRA: {why}. Clients train A and B of a plain one.")
    plans = {name: _planned(name, rows, args, config) for name, rows in clients.items() if args.privacy is not None}
    alone = _not_private(args)
    model_config = dry_run.check(model_id, args, peft_config)
    rows = concatenate_datasets(list(clients.values()))
    prepare.prepare(
        model_id, alone, model_config, processing_class_for(model_id, None, args), rows, held_out, peft_config
    )
    return plans


def _planned(client: str, rows, args, config: FederatedConfig):
    """Return the plan of a client's turn, whose noise is that of all turns it may be drawn for."""
    from posttrain.privacy import turns
    from posttrain.run import private_settings

    try:
        with turns.of_client(LEDGERS, config.rounds):
            return private_settings.planned(args, rows)
    except (ConfigError, DataError) as error:
        kind = ConfigError if isinstance(error, ConfigError) else DataError
        raise kind(f"client {client}: {error}") from None


def _not_private(args):
    """Return the settings of a trainer without steps of its own, for checks of rows and for evaluation."""
    from posttrain import NoisySFTConfig

    if args.privacy is None:
        return args
    known = {entry.name for entry in dataclasses.fields(NoisySFTConfig) if entry.init} & args._written
    made = NoisySFTConfig(**{name: getattr(args, name) for name in known})
    made.model_init_kwargs = args.model_init_kwargs
    return made


def describe(model_id: str, args, config: FederatedConfig, clients: dict, peft_config, held_out=None) -> dict:
    """Tell clients, rounds and what a private client spends, and a turn of the client with the fewest rows.

    Raises:
        ConfigError, DataError, EnvironmentIssue: as `prepare`.
    """
    from posttrain.privacy import turns

    plans = prepare(model_id, args, config, clients, peft_config, held_out)
    sizes = {name: len(rows) for name, rows in clients.items()}
    least = min(sizes, key=sizes.get)
    facts = {
        "method": config.method,
        "rounds": config.rounds,
        "clients": len(clients),
        "clients per round": config.clients_per_round or len(clients),
        "rows of a client": ", ".join(f"{name} {size:,}" for name, size in sizes.items()),
    }
    if plans and args.privacy.is_private:
        told = {name: f"{plan.epsilon:.4g} (noise {plan.noise_multiplier:.4g})" for name, plan in plans.items()}
        facts["epsilon of all rounds"] = ", ".join(f"{name} {one}" for name, one in told.items())
    facts["what follows is a turn of"] = least
    with turns.of_client(LEDGERS, config.rounds):
        return facts | instructions.describe(model_id, args, clients[least], peft_config, held_out)


def train(
    model_id: str, args, config: FederatedConfig, clients: dict, peft_config, held_out=None, sections=None
) -> None:
    """Run the rounds, and save the adapter as a plain LoRA with the report and its curves.

    Args:
        model_id: a hub id or folder. args: of the clients' trainer. clients: as `load` returns them.
        sections: further settings to record, by name.
    """
    from transformers import AutoTokenizer

    from posttrain.federated.clients import TrainerClients
    from posttrain.federated.loop import FederatedLoop
    from posttrain.run import lock
    from posttrain.run.report import write_resolved_config

    prepare(model_id, args, config, clients, peft_config, held_out)
    folder = Path(args.output_dir)
    resumes = args.resume_from_checkpoint == "auto" and (folder / REPORTS).exists()
    with lock.held(folder):
        model = load_model(model_id, args, peft_config)
        tokenizer = AutoTokenizer.from_pretrained(model_id)
        made = TrainerClients(model, clients, builder(args, tokenizer), config, folder / LEDGERS)
        evaluate = None if held_out is None else Evaluation(made, _not_private(args), tokenizer, held_out)
        identity = made.identity() | {"turn": _turn_of(args)}
        loop = FederatedLoop(made.start, made.rows, made, config, folder, evaluate, identity)
        sections = {"federated": vars(config), **(sections or {})}
        write_resolved_config(args, folder / "resolved_config.yaml", sections)
        with _without_bars():
            shared = loop.run(resumes)
        # of a run that was over already
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        made.save(folder / ADAPTER, shared)
        tokenizer.save_pretrained(folder / ADAPTER)
        federated_card.write(folder / ADAPTER, model_id, args, config, loop.reports)
        curves.write(loop.reports, folder / CURVES)
        _tell(loop.reports[-1])
        say(visible(hide(f"Saved to {folder / ADAPTER}")))


def _turn_of(args) -> dict[str, str]:
    """Return the settings of a turn that a run which goes on must share, as texts: some are infinite, or enums."""
    own = identity_of(args) | {name: getattr(args, name) for name in _UPDATE}
    return {name: str(getattr(value, "value", value)) for name, value in own.items()}


@contextlib.contextmanager
def _without_bars():
    """Leave out the bars of what is done to rows, of which each turn of a client has some."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _tell(report: dict) -> None:
    """Print what the last round came to, of each client."""
    from posttrain.tables import format_table

    def shown(value):
        return "" if value is None else f"{value:.4g}"

    names = ("loss", "rows", "update_norm", "epsilon")
    lines = [(client, *(shown(told[name]) for name in names)) for client, told in report["clients"].items()]
    say(format_table(("client", *names), lines))
    for name, value in report["evaluation"].items():
        say(f"{name} {shown(value)}")
