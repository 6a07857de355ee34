"""Rewards by name, as a config gives them."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from functools import partial

from posttrain.checks import check_option, near, parse_query, parse_scalar
from posttrain.errors import ConfigError
from posttrain.rewards.base import Reward
from posttrain.rewards.format import Format
from posttrain.rewards.gym import GymScore
from posttrain.rewards.length import OverlongPenalty
from posttrain.rewards.maths import ExactMatch, MathsAnswer
from posttrain.rewards.user import UserReward
from posttrain.user_code import import_function

BUILT_IN = {
    "maths_answer": MathsAnswer,
    "exact_match": ExactMatch,
    "format": Format,
    "length": OverlongPenalty,
    "gym": GymScore,
}


def get_reward(name: str, *, allowed: Collection[str] | None = None, **settings) -> Reward:
    """Return the reward of a name, with its settings.

    Args:
        name: one of maths_answer, exact_match, format, length and gym, or `module:function` for one of your own, found
            where Python imports from and in the working folder. Settings may follow as
            `length?max_length=512&cache=128`.
        allowed: modules that `name` may be of, beside those in the recipe's folder; None where a program of yours names
            the function itself, which may be any.
        settings: of the reward; for a function of your own, keyword arguments it is always called with.

    Raises ConfigError, naming the nearest name, for what does not exist, and as the reward does for its settings.
    """
    return _named(name, settings, allowed, "reward_funcs")


def get_rewards(
    specs: Iterable, allowed: Collection[str] | None = None, *, config_field: str = "reward_funcs"
) -> list[Reward]:
    """Make the rewards of what a config's `reward_funcs` lists.

    Each is a name as in `get_reward`, a mapping of one name to its settings (`length: {max_length: 512, cache: 128}`),
    a function, or a reward. `allowed`: as in `get_reward`, whose ConfigErrors come through, with `config_field` as the
    setting that they name.
    """
    specs = [specs] if isinstance(specs, str | Mapping) or callable(specs) else list(specs)
    if not specs:
        raise ConfigError(f"{config_field} is empty; name a reward such as maths_answer.")
    return [_reward(spec, allowed, config_field) for spec in specs]


def _reward(spec, allowed, config_field: str) -> Reward:
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, str):
        return _named(spec, {}, allowed, config_field)
    if isinstance(spec, Mapping):
        if len(spec) != 1 or not all(isinstance(value, Mapping | None) for value in spec.values()):
            raise ConfigError(f"{config_field}: {dict(spec)!r} must map one reward's name to its settings.")
        ((name, settings),) = spec.items()
        return _named(str(name), dict(settings or {}), allowed, config_field)
    if callable(spec):
        return UserReward(spec)
    raise ConfigError(f"{config_field}: {spec!r} is neither a reward's name nor a function.")


def _named(name: str, settings: dict, allowed, config_field: str) -> Reward:
    name, _, query = name.partition("?")
    settings = {**_settings(name, query, config_field), **settings}
    if ":" in name:
        return _users_reward(import_function(name, config_field, allowed), settings)
    if name not in BUILT_IN:
        close = near(name, BUILT_IN)
        hint = f" Did you mean {close!r}?" if close else ""
        raise ConfigError(
            f"{config_field}: {name!r} is not known.{hint} There are {', '.join(BUILT_IN)}, and your own as "
            "module:function."
        )
    kind = BUILT_IN[name]
    known = [field.name for field in fields(kind)]
    for setting in settings:
        check_option(f"{config_field}: {name}", setting, known, "setting")
    try:
        return kind(**settings)
    except ConfigError as error:
        raise ConfigError(f"{config_field}: {name}: {error}") from None


def _users_reward(found: Callable, settings: dict) -> Reward:
    if isinstance(found, type):
        found, settings = found(**settings), {}
    if settings:
        return UserReward(partial(found, **settings))
    return found if isinstance(found, Reward) else UserReward(found)


def _settings(name: str, query: str, config_field: str) -> dict:
    parsed = parse_query(query, f"{config_field}: {name}?{query}", "settings")
    return {key: parse_scalar(text) for key, text in parsed.items()}
