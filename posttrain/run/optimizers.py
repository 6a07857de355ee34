"""Optimizers by name: transformers' own, `torch.optim:NAME`, `pytorch_optimizer:NAME`, or a class as `module:Class`.

transformers' names go through its Trainer. Of the others a trainer hands over the rate, the groups' weight
decay and `optim_args`, and nothing else: Adam's betas and epsilon are settings of Adam.
"""

import re

import torch
from transformers.training_args import OptimizerNames

from posttrain.checks import near, shorten
from posttrain.errors import ConfigError, EnvironmentIssue, ExcludedSetting, require
from posttrain.log import get_logger
from posttrain.run import optimizer_args, optimizer_names, upstream_optimizers
from posttrain.run.engines import deepspeed_settings, sharding, under_deepspeed
from posttrain.run.optimizer_trials import Chosen, is_elementwise, shrinks_evenly, try_out
from posttrain.user_code import import_function

UPSTREAM = tuple(member.value for member in OptimizerNames)
TORCH, PACKAGE = "torch.optim", "pytorch_optimizer"
# what transformers hands to its own names alone
_ADAMS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules")
_CONSTANT = ("constant", "constant_with_warmup")


def is_upstream(name: str) -> bool:
    """Tell whether a name is one of transformers' own."""
    return name in UPSTREAM


def canonical(name: str) -> str:
    """Return a name as it is told and compared: `torch.optim.nadam` is `torch.optim:NAdam`.

    Raises ConfigError for one that is no optimizer's, with what it may mean.
    """
    if is_upstream(name):
        return name
    for owner in (TORCH, PACKAGE):
        if name.startswith((f"{owner}.", f"{owner}:")):
            return f"{owner}:{_known(owner, name[len(owner) + 1 :])}"
    if re.fullmatch(r"[^:]+:[^:]+", name):
        return name
    words = [f"{TORCH}:{one}" for one in _torch_names() if one not in optimizer_names.NOT_CALLABLE_TORCH]
    words += [f"{PACKAGE}:{one}" for one in _package_names() if one not in optimizer_names.NOT_CALLABLE]
    shorts = {optimizer_names.short(one): one for one in (*reversed(words), *UPSTREAM)}
    close = near(optimizer_names.short(name), shorts)
    hint = f" Did you mean {shorts[close]}?" if close else ""
    if "." in name and not close:
        hint = f" A class of your own is written {':'.join(name.rsplit('.', 1))}."
    raise ConfigError(
        f"optim is {shorten(name)}; it must be one of transformers' names ({', '.join(UPSTREAM[:3])}, ...), "
        f"{TORCH}:NAME, {PACKAGE}:NAME or module:Class.{hint}"
    )


def _known(owner: str, name: str) -> str:
    names = _torch_names() if owner == TORCH else _package_names(needed=f"optim {owner}:{shorten(name).strip(chr(39))}")
    refused = optimizer_names.NOT_CALLABLE_TORCH if owner == TORCH else optimizer_names.NOT_CALLABLE
    by_letters = {one.lower(): one for one in [*names, *refused]}
    found = by_letters.get(name.lower())
    if found is None:
        callable_ones = [one for one in by_letters if by_letters[one] not in refused]
        close = near(name.lower().replace("_", "").replace("-", ""), callable_ones)
        hint = f"Did you mean {owner}:{by_letters[close]}?" if close else f"It has {', '.join(names)}."
        raise ConfigError(f"optim is {shorten(f'{owner}:{name}')}, which {owner} does not have. {hint}")
    return found


def _torch_names() -> list[str]:
    kinds = {name: kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return sorted(n for n, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer) and n != "Optimizer")


def _package_names(needed: str | None = None) -> list[str]:
    """Return the names of pytorch_optimizer; none where it is missing, or EnvironmentIssue where it is `needed`."""
    try:
        return list(_package().get_supported_optimizers())
    except EnvironmentIssue:
        if needed:
            require(PACKAGE, "optimizers", needed)
            raise
        return []


def _package():
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise EnvironmentIssue(
            f'pytorch_optimizer cannot be imported ({error}): pip install "posttrain[optimizers]".'
        ) from error
    return pytorch_optimizer


def choose(args) -> Chosen | None:
    """Return the optimizer that a config names beside transformers' own; None where it names one of those.

    Args:
        args: a trainer's config, whose `optim` is canonical; its `allow_code` says which modules may be imported.

    Raises:
        ConfigError: one that no trainer can call, or arguments that it does not take.
        EnvironmentIssue: pytorch_optimizer is missing.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if is_upstream(name):
        return None
    owner, _, own = name.partition(":")
    refused = {TORCH: optimizer_names.NOT_CALLABLE_TORCH, PACKAGE: optimizer_names.NOT_CALLABLE}.get(owner, {})
    if own in refused:
        raise ConfigError(f"optim is {name}, which {refused[own]}.")
    if owner == TORCH:
        kind = getattr(torch.optim, own)
    elif owner == PACKAGE:
        kind = _package().load_optimizer(own)
    else:
        kind = import_function(name, "optim", args.allow_code)
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):
        raise ConfigError(f"optim is {name}, which is no class of optimizers: it must stand on torch.optim.Optimizer.")
    if not optimizer_args.takes(kind, "lr"):
        raise ConfigError(f"optim is {name}, whose constructor takes no lr, so that learning_rate would do nothing.")
    if args.weight_decay and not optimizer_args.takes(kind, "weight_decay"):
        raise ExcludedSetting(
            f"weight_decay is {args.weight_decay:g}, and optim {name} takes none. Leave weight_decay out.",
            {"weight_decay": ("optim",)},
        )
    settings = optimizer_args.read(kind, args.optim_args, name)
    if owner in (TORCH, PACKAGE):
        settings = optimizer_names.decoupling(name, optimizer_args.arguments(kind)) | settings
    return Chosen(name, kind, settings)


def class_and_settings(args) -> tuple[type, dict] | None:
    """Return what `transformers.Trainer` takes as `optimizer_cls_and_kwargs`; None for transformers' own names."""
    chosen = choose(args)
    return chosen and (chosen.kind, {"lr": args.learning_rate, **chosen.settings})


def check(args) -> None:
    """Refuse an optimizer that a run could not go on with, before any weight loads.

    Args:
        args: a trainer's config that TRL has resolved.

    Raises:
        ConfigError: what `choose` refuses; one that cannot be built or stepped with these arguments; one whose rule an
            engine's parts of matrices would change; settings that it leaves without effect.
        EnvironmentIssue: its package is missing.
    """
    name, chosen = str(getattr(args.optim, "value", args.optim)), choose(args)
    if chosen is not None:
        for other in _ADAMS:
            if other in args._written and getattr(args, other) != _default(args, other):
                raise ExcludedSetting(
                    f"{other} is {getattr(args, other)}, which optim {name} is not given: it takes what optim_args "
                    f"says. Leave {other} out, or write it there.",
                    {other: ("optim",)},
                )
        saves = getattr(args.save_strategy, "value", args.save_strategy) != "no" and not args.save_only_model
        try_out(chosen, args.learning_rate, args.weight_decay, saves)
        if args.weight_decay and not shrinks_evenly(chosen):
            get_logger().warning(
                "weight_decay is %g, and optim %s as it is set does not decouple it: the decay is a part of the update "
                "and depends on the gradient, where AdamW shrinks all weights by one factor",
                args.weight_decay, name,
            )  # fmt: skip
    _check_engine(args, name, chosen)
    if chosen is None:
        upstream_optimizers.check(args, name)
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if optimizer_names.wants_constant_rate(name) and schedule not in _CONSTANT:
        get_logger().warning(
            "optim %s does by itself what a schedule does, and lr_scheduler_type is %s: set `lr_scheduler_type: "
            "constant`",
            name, schedule,
        )  # fmt: skip
    if optimizer_names.finds_step_size(name) and args.learning_rate < 0.1:
        get_logger().warning(
            "optim %s estimates its step size, of which learning_rate (%g) is a factor: 1.0 is usual",
            name, args.learning_rate,
        )  # fmt: skip


def _default(args, name: str):
    return type(args).__dataclass_fields__[name].default


def _check_engine(args, name: str, chosen: Chosen | None) -> None:
    engine, settings = sharding(args), deepspeed_settings(args)
    if engine is None:
        return
    block, has_block = settings.get("optimizer"), under_deepspeed(args) and "optimizer" in settings
    if has_block and "optim" in args._written:
        kind = block.get("type", "one of its own") if isinstance(block, dict) else "one of its own"
        raise ConfigError(
            f"optim is {name}, and the DeepSpeed config has an `optimizer` block ({kind}), which would be used in its "
            "place. Leave one of them out."
        )
    if has_block and chosen is None:
        _check_block(block, args.optim_args)
        return
    if name not in optimizer_names.SHARDABLE:
        raise ConfigError(
            f"optim {name} {optimizer_names.why_not_sharded(name)}; {engine} gives it flat or cut parts of matrices, "
            "which would change its rule without a word. Use DDP or one process, or an optimizer whose rule is "
            "elementwise, such as pytorch_optimizer:ademamix (docs/optimizers.md lists them)."
        )
    if chosen is None:
        return
    if not is_elementwise(chosen, args.learning_rate, args.weight_decay):
        raise ConfigError(
            f"optim {name} with optim_args {args.optim_args!r} moves a part of a matrix otherwise than the whole "
            f"matrix; {engine} gives it such parts. Leave the arguments out that read more than each number by itself."
        )
    offload = (settings.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and settings.get("zero_force_ds_cpu_optimizer", True):
        raise ConfigError(
            f"optim is {name}, and the DeepSpeed config offloads optimizer state to the {offload['device']}, where "
            "DeepSpeed takes its own Adam alone. Write `zero_force_ds_cpu_optimizer: false` into that config, or leave "
            "offload_optimizer out."
        )


def _check_block(block, optim_args: str | None) -> None:
    kind = block.get("type") if isinstance(block, dict) else None
    known = ", ".join(optimizer_names.DEEPSPEED_ELEMENTWISE)
    if not (isinstance(kind, str) and kind):
        raise ConfigError(
            f"the DeepSpeed config has an `optimizer` block whose type is {shorten(kind)}. Write one of {known}, or "
            "leave the block out and set optim."
        )
    if optim_args:
        raise ConfigError(
            f"optim_args is {optim_args!r}, and the DeepSpeed config has an `optimizer` block ({kind}), which does not "
            "read it. Write the arguments into its `params`, or leave the block out."
        )
    if not optimizer_names.is_elementwise_in_deepspeed(kind):
        raise ConfigError(
            f"the DeepSpeed config has an `optimizer` block of type {kind}, which "
            f"{optimizer_names.why_not_sharded(kind.lower())}; DeepSpeed ZeRO gives it flat parts of matrices, which "
            f"would change its rule without a word. Use {known} or an elementwise class of torch.optim, or leave the "
            "block out and set optim."
        )


def give_to(trainer) -> None:
    """Give a trainer the class that its `optim` names, after its parent's constructor.

    Raises ConfigError where an optimizer was given beside the name of another.
    """
    found = class_and_settings(trainer.args)
    if found is None:
        return
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        given = "optimizers" if trainer.optimizer is not None else "optimizer_cls_and_kwargs"
        raise ConfigError(f"optim is {trainer.args.optim}, and {given} was given as well. Leave one of them out.")
    trainer.optimizer_cls_and_kwargs = found
