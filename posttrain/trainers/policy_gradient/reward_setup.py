"""Rewards of a trainer: what TRL is given as `reward_funcs`, and what is refused of the scores."""

import copy
import itertools

import torch
from torch import Tensor
from trl.trainer.utils import get_config_model_id

from posttrain.errors import ConfigError, DataError, PosttrainError
from posttrain.rewards import get_rewards
from posttrain.rewards.base import Reward
from posttrain.rewards.registry import BUILT_IN
from posttrain.run import checks


def reward_functions(specs, args) -> list | None:
    """Resolve rewards: functions guarded as `UserReward`, built-in ones by name, reward models and ids unchanged.

    Raises:
        ConfigError, EnvironmentIssue: a name that is neither a reward's nor a model's that can be loaded.
    """
    if specs is None:
        return None
    return numbered([_reward(spec, args) for spec in (specs if isinstance(specs, list | tuple) else [specs])])


def numbered(functions: list) -> list:
    """Name `functions` uniquely: of rewards that share a name, the first keeps it, the others are NAME_2, NAME_3, ...

    TRL keeps metrics and completions by name, so two of one name would be logged as their mixture. Reward models and
    their ids stay as they are.
    """
    taken, named = {getattr(function, "__name__", None) for function in functions}, []
    seen = set()
    for function in functions:
        name = getattr(function, "__name__", None)
        if isinstance(function, Reward) and name in seen:
            if any(function is other for other in named):
                function = copy.copy(function)
            function.__name__ = next(f"{name}_{n}" for n in itertools.count(2) if f"{name}_{n}" not in taken)
            taken.add(function.__name__)
        seen.add(function.__name__ if isinstance(function, Reward) else name)
        named.append(function)
    return named


def _reward(spec, args):
    if isinstance(spec, torch.nn.Module):
        return spec
    if not isinstance(spec, str) or ":" in spec or spec.partition("?")[0] in BUILT_IN:
        return get_rewards([spec], args.allow_code)[0]
    try:
        checks.load_config(spec, args)
    except PosttrainError as error:
        raise type(error)(
            f"reward_funcs: {spec!r} is no reward's name ({', '.join(BUILT_IN)}, or your own as module:function), and "
            f"no reward model: {error}"
        ) from error
    return spec


def check(args, functions: list | None, in_environment: bool = False) -> None:
    """Check `reward_weights` and `success_reward` against the reward functions, before any weight loads.

    Args:
        functions: as `reward_functions` resolves them.
        in_environment: whether an environment may bring a reward of its own, of weight 1, whose name is not known yet.

    Raises:
        ConfigError: another number of weights, or a name that none of the functions has.
    """
    count = len(functions or ())
    if args.reward_weights is not None and len(args.reward_weights) != count:
        raise ConfigError(
            f"reward_weights has {len(args.reward_weights)} weights for {count} reward functions; give one for each."
        )

    if not in_environment:
        check_success_reward(args, list(map(_name, functions or ())))


def check_success_reward(args, names: list[str]) -> None:
    """Raise ConfigError where `success_reward` names none of the reward functions."""
    if args.success_reward is not None and args.success_reward not in names:
        raise ConfigError(f"success_reward is {args.success_reward!r}; it must be one of {', '.join(names)}.")


def _name(function) -> str:
    """Return the name that TRL gives a reward function; that of a model is the last part of its id."""
    if isinstance(function, torch.nn.Module):
        function = get_config_model_id(function.config)
    return function.split("/")[-1] if isinstance(function, str) else function.__name__


def check_scores(trainer, rewards: Tensor) -> None:
    """Refuse infinite scores (N, F) of all ranks, and a generation without any where a reward function raised.

    Raises:
        DataError: an infinite score; in training, no score at all where a function has raised.
        ConfigError: a function of which every call so far, on every rank, has raised.
    """
    step, names = trainer.state.global_step + 1, trainer.reward_func_names
    infinite = torch.isinf(rewards)
    if infinite.any():
        column = int(infinite.any(dim=0).nonzero()[0])
        count = int(infinite[:, column].sum())
        raise DataError(
            f"reward function {names[column]} gave {rewards[infinite[:, column], column][0].item()} for {count} of "
            f"{len(rewards)} completions of step {step}; a reward is a finite number, or None where there is none."
        )
    if trainer.model.training and torch.isnan(rewards).all():
        raised = [
            f" The last exception of {name}: {function.last_exception}."
            for name, function in zip(names, trainer.reward_funcs, strict=True)
            if getattr(function, "last_exception", None)
        ]
        # without an exception None is an answer; TRL warns of each such generation
        if raised:
            raise DataError(
                f"every reward function returned None for all {len(rewards)} completions of step {step}, so there is "
                f"nothing to learn from.{''.join(raised)} Look at what {', '.join(names)} make of the completions, and "
                "at the columns they are given."
            )
    _check_working(trainer, rewards)


def _check_working(trainer, rewards: Tensor) -> None:
    silent = torch.isnan(rewards).all(dim=0)
    # ranks agree on `silent`, so that all of them gather or none
    if not silent.any():
        return
    raised = [bool(getattr(function, "only_raised", False)) for function in trainer.reward_funcs]
    raised = trainer.accelerator.gather(torch.tensor([raised], dtype=torch.int32, device=rewards.device))
    everywhere = raised.bool().all(dim=0) & silent
    if not everywhere.any():
        return
    column = int(everywhere.nonzero()[0])
    raise ConfigError(
        f"reward function {trainer.reward_func_names[column]} raised for all {len(rewards)} completions that it was "
        f"given in step {trainer.state.global_step + 1}, and has given no score before. Mend it, or return None for "
        f"completions it cannot score. The exception: {trainer.reward_funcs[column].last_exception}"
    )


def check_success(args, scores: Tensor) -> None:
    """Refuse scores (P, G) in which the default threshold cannot tell success.

    Raises:
        ConfigError: `success_threshold` was not set, and a score is neither 0 nor 1.
    """
    if args.success_threshold is not None:
        return
    other = scores[(scores != 0) & (scores != 1) & ~torch.isnan(scores)]
    if len(other):
        raise ConfigError(
            f"success is read from a reward of {other[0].item():g}, which is neither 0 nor 1, and success_threshold is "
            "not set. Set success_threshold to the least reward of a success, or success_reward to the name of a "
            "reward function that gives 0 or 1."
        )
