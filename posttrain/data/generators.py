"""Data sets that are made, by the names that sources have for them: `generated:NAME` and `gym:NAME`, with options."""

import re
from collections.abc import Callable, Iterable
from inspect import signature

from posttrain.checks import check_option, parse_query, parse_scalar
from posttrain.data.generated import arithmetic_tasks, modular_sum_tasks, reverse_list_pairs
from posttrain.data.tasks.gym import gym_tasks
from posttrain.errors import ConfigError

PAIRS, TASKS = "pairs", "tasks"
_MADE = {
    "reverse_list": (PAIRS, reverse_list_pairs),
    "arithmetic": (TASKS, arithmetic_tasks),
    "modular_sum": (TASKS, modular_sum_tasks),
}
_RANGES = ("operands", "digits", "terms")


def is_made(source: str) -> bool:
    """Return whether a source names a data set that is made, not read."""
    return source.startswith(("generated:", "gym:"))


def make(source: str, split: str = "train", kind: str | None = None, conversational: bool = True):
    """Make the data set that a source names, as a `datasets.Dataset`.

    Args:
        source: `generated:reverse_list`, `generated:arithmetic`, `generated:modular_sum` or `gym:NAME`, a data set of
            reasoning-gym; options follow as in `generated:arithmetic?n=256&seed=0&operands=2-4&operators=+-`.
        split: any but `train` has rows that are disjoint from the training ones.
        kind: pairs or tasks, where only one of them will do.
        conversational: make tasks of messages if true, of texts if false.

    Raises ConfigError for unknown names and options and for data sets of the other kind, EnvironmentIssue where
    reasoning-gym is missing.
    """
    family, _, rest = source.partition(":")
    name, _, query = rest.partition("?")
    made, function = _MADE.get(name, (None, None)) if family == "generated" else (TASKS, gym_tasks)
    if made is None or kind not in (None, made):
        raise ConfigError(f"{source!r} {_what(made)}; {_known(kind)}.")
    options = {key: _value(key, text) for key, text in parse_query(query, repr(source)).items()}
    n, seed = options.pop("n", 256), options.pop("seed", 0)
    for key, value in (("n", n), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{source!r}: {key}={value!r} is no integer.")
    if made == TASKS:
        options = {"conversational": conversational, **options}
    if family == "generated":
        _check_options(source, options, function)
        draw = function
    else:

        def draw(n: int, seed: int, exclude: Iterable[dict] = (), **options):
            return gym_tasks(name, n, seed, exclude, **options)

    try:
        train = draw(n, seed, **options)
        return train if split == "train" else draw(n, seed + 1, exclude=train, **options)
    except ValueError as error:
        # ConfigError is one
        raise ConfigError(f"{source!r}: {error}") from None


def _what(kind: str | None) -> str:
    return "is not known" if kind is None else f"makes {kind}"


def _known(kind: str | None) -> str:
    names = [f"generated:{name}" for name, (made, _) in _MADE.items() if kind in (None, made)]
    if kind in (None, TASKS):
        names.append("gym:NAME")
    return f"generated data sets are {', '.join(names)}" if kind is None else f"generated {kind} are {', '.join(names)}"


def _check_options(source: str, options: dict, function: Callable) -> None:
    parameters = signature(function).parameters
    known = ["n", "seed", *(name for name in parameters if name not in ("n", "seed", "exclude"))]
    for option, value in options.items():
        check_option(repr(source), option, known)
        if isinstance(parameters[option].default, bool) and not isinstance(value, bool):
            raise ConfigError(f"{source!r}: {option}={value!r} must be true or false.")


def _value(key: str, text: str):
    span = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if span and key in _RANGES:
        return int(span[1]), int(span[2])
    if key in _RANGES and re.fullmatch(r"\d{1,9}", text):
        return int(text), int(text)
    return parse_scalar(text)
