"""What the scheme of a run's adapter does in the run, whatever the family; of a plain adapter nothing."""

import contextlib
from pathlib import Path

from accelerate.utils import is_peft_model
from transformers import TrainerCallback

from posttrain.config.schemes import SCHEMES, named


class InRun(TrainerCallback):
    """What a scheme does in a run, step by step; here nothing, and each scheme overrides what it needs.

    Attributes:
        noise_kind: of the noise that forwards which are trained have on weights: gaussian, uniform or none.
    """

    noise_kind = "none"

    def __init__(self, trainer=None) -> None:
        """Set up the adapter of a trainer whose rows are tokenised, before any forward; all ranks call it."""

    @staticmethod
    def check(config, args) -> None:
        """Refuse settings beside an adapter's config under which it would not be what it says.

        Raises ConfigError, before the model loads.
        """

    def know_copies(self) -> None:
        """Take over adapters that were copied from this one, as the reference's."""

    def restore(self, checkpoint: Path) -> None:
        """Take over what a checkpoint holds of the adapter beside its weights, before training goes on from it."""

    def whole(self, state_dict: dict) -> dict:
        """Return a model's tensors by name with those that were left out and belong to the adapter's file."""
        return state_dict

    def during_step(self):
        """Return the context of a training step's forward and backward."""
        return contextlib.nullcontext()

    def after_step(self) -> None:
        """Do what follows a training step's forward and backward."""


def check(config, args) -> None:
    """Refuse settings beside an adapter's scheme, which the scheme itself says.

    Args:
        config: an adapter's, of any kind, or None. args: the trainer's config.
    """
    kind = _kind_of(config)
    if kind is not InRun:
        kind.check(config, args)


def of(trainer) -> InRun:
    """Return what the scheme of a trainer's adapter does in the run, set up."""
    if not is_peft_model(trainer.model):
        return InRun()
    attach(trainer.model)
    config = trainer.model.peft_config.get("default")
    if hasattr(config, "scheme"):
        config.check_placed(trainer.model)
    return _kind_of(config)(trainer)


def attach(model) -> None:
    """Make each adapter of a model its scheme's, also where PEFT has put a plain one on layers that had another."""
    for name, config in model.peft_config.items():
        if hasattr(config, "scheme"):
            config.attach(model, name)


def _kind_of(config) -> type[InRun]:
    path = SCHEMES[config.called].in_run if hasattr(config, "scheme") else None
    return InRun if path is None else named(path)
