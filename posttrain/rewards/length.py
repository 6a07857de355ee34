"""A reward that keeps completions from running into the limit of their length."""

from dataclasses import dataclass

from posttrain.checks import check_integer
from posttrain.errors import ConfigError
from posttrain.rewards.base import Reward


@dataclass(eq=False)
class OverlongPenalty(Reward):
    """DAPO's soft penalty for overlong completions.

        n <= L - C:      0
        L - C < n <= L:  (L - C - n) / C
        L < n:           -1

    with n the completion's tokens, L `max_length` and C `cache`. The definition is taken from secondary sources and
    equals TRL's; the paper was not read (arXiv 2503.14476, eq. 13), so its defaults are not ours and both values have
    to be given: the authors' runs are said to use L 20480 and C 4096. With `max_length` equal to
    `max_completion_length`, a completion that was cut off gets -1.

    Args:
        max_length: tokens, at least 1. cache: tokens, between 1 and max_length.

    Raises ConfigError for values out of range, or where the trainer passes no completion_ids.
    """

    max_length: int | None = None
    cache: int | None = None

    __name__ = "length"

    def __post_init__(self):
        super().__post_init__()
        missing = [name for name in ("max_length", "cache") if getattr(self, name) is None]
        if missing:
            raise ConfigError(
                f"{' and '.join(missing)} must be given, in tokens, such as `length?max_length=512&cache=128`."
            )
        self.max_length = check_integer("max_length", self.max_length, 1)
        self.cache = check_integer("cache", self.cache, 1, self.max_length)

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        if completion_ids is None:
            raise ConfigError("reward length counts tokens: call it with `completion_ids`, as TRL's trainers do.")
        free = self.max_length - self.cache
        return self._scored([min(0.0, max(-1.0, (free - len(ids)) / self.cache)) for ids in completion_ids])
