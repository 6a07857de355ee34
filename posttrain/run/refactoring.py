"""`refactor_every` in a run, whatever its family: what is refused before anything loads, and what does it."""

import torch
from peft import PeftModel
from transformers import Trainer

from posttrain.adapters import refactoring
from posttrain.checks import check_choice, check_integer
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.run import optimizers
from posttrain.run.init_kwargs import is_quantised


def check_settings(args) -> None:
    """Check a config's own settings of it; `null` becomes 0. Raises ConfigError."""
    if args.refactor_every is None:
        args.refactor_every = 0
    check_integer("refactor_every", args.refactor_every, 0)
    check_choice("refactor_second_moment", args.refactor_second_moment, refactoring.SECOND_MOMENTS)
    if not args.refactor_every:
        if args.refactor_second_moment != "estimate":
            raise ExcludedSetting(
                f"refactor_second_moment is {args.refactor_second_moment}, which has no effect without refactor_every. "
                "Set `refactor_every: 100`, or leave refactor_second_moment out.",
                {"refactor_second_moment": ("refactor_every",)},
            )
        return
    refactoring.check_engine(args)
    refactoring.check_name(str(getattr(args.optim, "value", args.optim)), args.refactor_second_moment)


def check_update(args) -> None:
    """Refuse an optimizer, by its class and its groups' settings, whose state cannot be written in other factors.

    `args`: a trainer's config that TRL has resolved, whose optim can be built. Raises ConfigError.
    """
    if not args.refactor_every:
        return
    kind, settings = optimizers.class_and_settings(args) or Trainer.get_optimizer_cls_and_kwargs(args)
    refactoring.check_optimizer(kind, args.refactor_second_moment)
    made = kind([torch.nn.Parameter(torch.zeros(1))], **settings | {"weight_decay": args.weight_decay})
    refactoring.check_optimizer(made, args.refactor_second_moment)


def check_precision_to_come(args, config) -> None:
    """Refuse a base whose adapters become bf16, before it loads. `config`: the model's. Raises ConfigError."""
    if args.refactor_every and is_quantised(args, config):
        raise ConfigError(
            f"refactor_every is {args.refactor_every} on a base of 4 or 8 bits, whose adapters are bfloat16, as TRL "
            "casts them: each refactorisation would round the model. Leave load_in_4bit and load_in_8bit out, or "
            "refactor_every."
        )


def check(model, peft_config, args) -> None:
    """Refuse it for an adapter that it has no meaning for, by its config.

    Args:
        model: its name, or the model itself. peft_config: of a new adapter, or None. args: the trainer's config.
    """
    if not args.refactor_every:
        return
    own = model.peft_config.get("default") if isinstance(model, PeftModel) else None
    refactoring.check_adapter_config(peft_config or own)


def callback(trainer) -> refactoring.RefactorCallback:
    """Return what refactors a trainer's LoRA; ConfigError for an optimizer or layers that it has no meaning for."""
    args, kind = trainer.args, trainer.optimizer
    if kind is None:
        kind = (trainer.optimizer_cls_and_kwargs or trainer.get_optimizer_cls_and_kwargs(args, trainer.model))[0]
    refactoring.check_optimizer(kind, args.refactor_second_moment)
    refactoring.factors_of(trainer.model)
    return refactoring.RefactorCallback(args.refactor_every, args.refactor_second_moment)
