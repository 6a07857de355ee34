"""Private preference training: what it refuses, and its steps. The unit is a pair, or all pairs of a person."""

from posttrain.errors import ConfigError
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.plan import Plan
from posttrain.run.engines import sharding
from posttrain.run.private import PrivateRun
from posttrain.run.private_settings import planned, units_of
from posttrain.trainers.preference.robust_dpo_config import RobustDPOConfig

# of the trainer's settings: values that a private run may have, and what others would do
_REFUSED = (
    ("reduction", ("mean",), "weighs each pair by the others of its step"),
    ("prefix_sharing", ("auto", "never"), "packs pairs into one sequence, whose gradients are not apart"),
    ("fp16", (False, None), "scales gradients by what the rows before them were; use bf16"),
    ("torch_compile", (False, None), "would compile past the layers that gradients of rows are taken in"),
    ("auto_find_batch_size", (False,), "takes steps again"),
    ("load_best_model_at_end", (False,), "chooses weights by an evaluation, which the promise does not cover"),
    ("gradient_agreement", (None,), "leaves out micro-batches by what their rows are"),
    ("sam_rho", (0, 0.0), "moves the weights by a gradient without noise"),
    ("refactor_every", (0, None), "puts other matrices in the place of those that gradients of rows are taken of"),
    ("dataloader_drop_last", (False,), "has no meaning for rows that are drawn"),
    ("train_sampling_strategy", ("random",), "has no meaning for rows that are drawn"),
)


def settle(args, privacy) -> None:
    """Refuse settings with which pairs are not apart, and put what follows from privacy in place; ConfigError."""
    if not isinstance(privacy, PrivacyConfig):
        raise ConfigError(f"privacy is a {type(privacy).__name__}; it must be a PrivacyConfig, or None.")
    if not isinstance(args, RobustDPOConfig):
        raise ConfigError(f"args is a {type(args).__name__} beside privacy; it must be a RobustDPOConfig then.")
    args.draws_pairs = True
    if args.max_grad_norm and "max_grad_norm" in args._written:
        raise ConfigError(
            f"max_grad_norm is {args.max_grad_norm}, which would cut the noisy gradient, its noise and all; clip_norm "
            "cuts each unit's. Leave max_grad_norm out in a private run."
        )
    args.max_grad_norm = 0.0
    for name, neutral, why in _REFUSED:
        value = getattr(args, name)
        if value not in neutral:
            raise ConfigError(f"{name} is {value}, which {why}. Leave {name} out in a private run.")
    args.prefix_sharing = "never"
    engine = sharding(args)
    if engine:
        raise ConfigError(
            f"the run is launched under {engine}, which reduces gradients before they are clipped. Launch one process, "
            "or several without it."
        )


def begin(trainer, privacy: PrivacyConfig, plan: Plan) -> tuple[Plan, PrivateRun]:
    """Make a trainer's steps private, once its model and its tokenised pairs are there; return their plan and them.

    `plan`: of the pairs as they were given; those of which `max_length` leaves nothing are gone by now.
    """
    dataset = trainer.train_dataset
    units = units_of(privacy, dataset)
    if plan.units != len(units):
        plan = planned(trainer.args, privacy, dataset)
    beside = ("ref_chosen_logps", "ref_rejected_logps", "flip_rate")
    rows = [row | {name: 0.0 for name in beside if name in dataset.column_names} for row in made_up(trainer.model)]
    return plan, PrivateRun(trainer, privacy, plan, units, rows[0], rows)


def made_up(model) -> list[dict]:
    """Return two pairs of made-up tokens, of unequal lengths."""
    size = model.config.get_text_config().vocab_size
    ids = [(7 * place + 3) % size for place in range(16)]
    return [
        {"prompt_ids": ids[:3], "chosen_ids": ids[3:6], "rejected_ids": ids[6:8]},
        {"prompt_ids": ids[8:10], "chosen_ids": ids[10:12], "rejected_ids": ids[12:16]},
    ]
