"""Users' own reward functions, run in process with their exceptions counted."""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import iscoroutinefunction, signature

from posttrain.checks import shorten
from posttrain.errors import ConfigError, PosttrainError
from posttrain.rewards.base import Reward
from posttrain.rewards.reads import texts_of

# Calls in a row that may raise before the run stops: so many steps without this reward teach nothing.
PATIENCE = 3


@dataclass(eq=False)
class UserReward(Reward):
    """A user's reward function, with TRL's interface, under its own name.

    A call that raises scores all its completions None, is counted and shown with the line it was raised at; after
    PATIENCE such calls in a row the run stops. This library's trainers stop at once where no call of the first
    generation returned, or no other reward gave a score. NaN is taken for None.

    Args:
        function: `fn(prompts, completions, completion_ids=None, **columns) -> list[float | None]`, or such a coroutine
            function. One without `**columns` is given the arguments that it names.

    Raises ConfigError for a function that cannot be called, the wrong number of scores, a score that is no number, and
    the last exception of too many.
    """

    function: Callable

    def __new__(cls, function: Callable = None):
        # TRL tells coroutine functions by their __call__.
        return super().__new__(_AsyncUserReward if cls is UserReward and _is_coroutine(function) else cls)

    def __post_init__(self):
        super().__post_init__()
        if not callable(self.function):
            raise ConfigError(f"reward function {self.function!r} cannot be called; give a function.")
        self.__name__ = _name_of(self.function)
        self._failures, self._named = 0, _named_arguments(self.function)

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        try:
            scores = self.function(**self._taken(given))
        except PosttrainError:
            raise
        except Exception as error:
            return self._failed(error, len(completions))
        return self._checked(scores, len(completions))

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(sorted(texts_of(self.function)))

    def _taken(self, given: dict) -> dict:
        return given if self._named is None else {name: given[name] for name in self._named if name in given}

    def _failed(self, error: Exception, samples: int) -> list[None]:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
        self._note_exception(message, samples)
        self._failures += 1
        if self._failures >= PATIENCE:
            raise ConfigError(
                f"reward function {self.__name__} raised in {PATIENCE} calls in a row; mend it, or return None for "
                f"completions it cannot score. The last: {message}"
            ) from error
        return [None] * samples

    def _checked(self, scores, samples: int) -> list[float | None]:
        self._failures, self._has_worked = 0, True
        try:
            scores = list(scores)
        except TypeError:
            raise ConfigError(
                f"reward function {self.__name__} returned {shorten(scores)}; it must return a list with a score for "
                "each completion."
            ) from None
        if len(scores) != samples:
            raise ConfigError(
                f"reward function {self.__name__} returned {len(scores)} scores for {samples} completions; it must "
                "return one for each, None where it has none."
            )
        return self._scored([self._number(score) for score in scores])

    def _number(self, score) -> float | None:
        if score is None:
            return None
        try:
            number = float(score)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(
                f"reward function {self.__name__} returned the score {shorten(score)}; a score is a number or None."
            ) from None
        return None if math.isnan(number) else number


class _AsyncUserReward(UserReward):
    async def __call__(self, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        try:
            scores = await self.function(**self._taken(given))
        except PosttrainError:
            raise
        except Exception as error:
            return self._failed(error, len(completions))
        return self._checked(scores, len(completions))


def _inner(function):
    while isinstance(function, partial):
        function = function.func
    return function


def _named_arguments(function) -> list[str] | None:
    """Return the names of a function's arguments; None where it takes any."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return None if any(one.kind is one.VAR_KEYWORD for one in parameters) else [one.name for one in parameters]


def _name_of(function) -> str:
    function = _inner(function)
    return getattr(function, "__name__", type(function).__name__)


def _is_coroutine(function) -> bool:
    function = _inner(function)
    return iscoroutinefunction(function) or iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
