"""The steps of private preference training. The unit is a pair, or all pairs of a person."""

import torch

from posttrain.errors import ConfigError
from posttrain.privacy.config import PrivacyConfig
from posttrain.run.checks import evaluating
from posttrain.run.private import PrivateRun
from posttrain.trainers.preference.robust_dpo_config import RobustDPOConfig


def private_settings_of(args, privacy: PrivacyConfig) -> RobustDPOConfig:
    """Return a copy of a trainer's settings as a private run has them.

    Raises ConfigError as `PreferenceConfig.as_private`, and for `args` of another class.
    """
    if not isinstance(args, RobustDPOConfig):
        raise ConfigError(f"args is a {type(args).__name__} beside privacy; it must be a RobustDPOConfig then.")
    return args.as_private(privacy)


def private_run(trainer) -> PrivateRun:
    """Return what makes a trainer's steps private, once its model and its tokenised pairs are there."""
    columns = trainer.train_dataset.column_names
    beside = ("ref_chosen_logps", "ref_rejected_logps", "flip_rate")
    rows = [row | {name: 0.0 for name in beside if name in columns} for row in made_up(trainer.model)]
    run = PrivateRun(trainer, rows[0], rows)
    _check_reference(trainer, run.made_up_batch())
    return run


def _check_reference(trainer, batch: dict) -> None:
    """Compare policy and reference at their start on made-up pairs: a run that stops for anyone's pair tells of it.

    Raises ConfigError as the check of a first batch does, which is not asked of pairs of data then.
    """
    model, was_training = trainer.model, trainer.model.training
    with torch.no_grad(), evaluating(model), trainer.compute_loss_context_manager(), trainer.plain_forward():
        scores = trainer.score(model, batch)
    reference = trainer.compute_ref_log_probs(model, batch)
    model.train()
    try:
        trainer._check_first_margins(model, scores, reference, batch)
    finally:
        model.train(was_training)


def made_up(model) -> list[dict]:
    """Return two pairs of made-up tokens, of unequal lengths."""
    size = model.config.get_text_config().vocab_size
    ids = [(7 * place + 3) % size for place in range(16)]
    return [
        {"prompt_ids": ids[:3], "chosen_ids": ids[3:6], "rejected_ids": ids[6:8]},
        {"prompt_ids": ids[8:10], "chosen_ids": ids[10:12], "rejected_ids": ids[12:16]},
    ]
