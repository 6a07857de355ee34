"""How much each scored answer beats what is expected of its prompt: values, advantages, their histogram."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.data.messages import described
from posttrain.data.scored.scales import check_size
from posttrain.errors import DataError
from posttrain.tables import histogram

# What a reward differs from its value by, relative to them, is rounding up to here; scores are rounded to fp32
ROUNDING = 1e-6
# The largest weight below this leaves gradients that fp32 rounds to nothing
_SMALLEST = 1e-12


def prompt_keys(dataset) -> list[str]:
    """Return a text for each row that equal prompts share, and no others."""
    # what the template renders beside the messages belongs to the prompt
    also = [name for name in ("tools", "chat_template_kwargs") if name in dataset.column_names]
    if not also:
        return [prompt_key(prompt) for prompt in dataset["prompt"]]
    return [
        json.dumps([json.loads(prompt_key(prompt)), *rest], sort_keys=True, default=str)
        for prompt, *rest in zip(dataset["prompt"], *(dataset[name][:] for name in also), strict=True)
    ]


def prompt_key(prompt) -> str:
    """Return a text for a prompt, given as text or as messages."""
    return json.dumps(prompt, sort_keys=True)


def mean(rewards: Sequence[float]) -> float:
    """Return the mean; of equal rewards exactly that one, so that rounding makes no advantage of nothing."""
    return min(max(math.fsum(rewards) / len(rewards), min(rewards)), max(rewards))


def mean_per_prompt(keys: Sequence[str], rewards: Sequence[float]) -> list[float]:
    """Return the mean reward of all answers to a row's prompt, its own included."""
    grouped = defaultdict(list)
    for key, reward in zip(keys, rewards, strict=True):
        grouped[key].append(reward)
    means = {key: mean(values) for key, values in grouped.items()}
    return [means[key] for key in keys]


def column_of_values(dataset, column: str, name: str, called: str | None = None) -> list[float]:
    """Read a column of values; DataError for one that is no finite number, or beyond 1e18, with its row.

    `called`: its name in the data set as given; default: `column`.
    """
    values, called = dataset[column][:], called or column
    for number, value in enumerate(values, 1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            shown = value if isinstance(value, float) else described(value)
            raise DataError(f"{name}, answer {number}: {called}, the value, is {shown}; it must be a finite number.")
        check_size(value, f"{name}, answer {number}", f"{called}, the value,")
    return [float(value) for value in values]


def values_of(dataset, value: str, column: str | None, name: str) -> list[float]:
    """Return the value of each row, of those that need no model: mean, per_prompt or column."""
    if value == "column":
        return column_of_values(dataset, column, name)
    rewards = dataset["reward"][:]
    if value == "per_prompt":
        return mean_per_prompt(prompt_keys(dataset), rewards)
    return [mean(rewards)] * len(rewards)


def advantages_of(rewards: Sequence[float], values: Sequence[float]) -> list[float]:
    """Compute the reward minus the value of each answer.

    0 where that is only rounding, at most 1e-6 of the larger of the two.
    """
    return [
        0.0 if abs(reward - value) <= ROUNDING * max(abs(reward), abs(value)) else reward - value
        for reward, value in zip(rewards, values, strict=True)
    ]


@dataclass
class Advantages:
    """What is known of a data set's advantages.

    Attributes:
        rows: answers in all; kept: those with a gradient. positive: share of all with an advantage above 0.
        mean, quantiles: of all advantages; quantiles at 0, 25, 50, 75 and 100%.
        effective: how many rows weigh as much as equally drawn ones would, 1 / sum of squared shares of A+.
    """

    rows: int
    kept: int
    positive: float
    mean: float
    quantiles: list[float]
    effective: float

    def summary(self) -> str:
        """Describe it in one line for the log."""
        spread = ", ".join(f"{value:.3g}" for value in self.quantiles)
        return (
            f"{self.kept} of {self.rows} answers have a gradient; {self.positive:.1%} beat their value; advantages: "
            f"mean {self.mean:.3g}, quartiles {spread}; they weigh as {self.effective:.0f} equal ones"
        )


def summarise(advantages: Sequence[float], weights: Sequence[float]) -> Advantages:
    """Describe advantages for the log; `weights`: the factor of each answer on its gradient.

    0 for one that is dropped.
    """
    ordered, rows = sorted(advantages), len(advantages)
    quartiles = [ordered[min(round(share * (rows - 1)), rows - 1)] for share in (0, 0.25, 0.5, 0.75, 1)]
    total, squares = math.fsum(map(abs, weights)), math.fsum(weight * weight for weight in weights)
    return Advantages(
        rows,
        sum(weight != 0 for weight in weights),
        sum(value > 0 for value in advantages) / rows,
        math.fsum(advantages) / rows,
        quartiles,
        total * total / squares if squares else 0.0,
    )


def check_positive(advantages: Sequence[float], value: str, name: str, lost: str = "") -> None:
    """Raise DataError, with the histogram, where no answer beats its value. `lost`: what `max_length` left out."""
    if any(advantage > 0 for advantage in advantages):
        return
    advice = {
        "per_prompt": "The mean over a prompt's answers needs several of them with different rewards; `value: mean` "
        "compares all answers.",
        "mean": "All rewards are equal, up to rounding, so there is nothing to tell answers apart by.",
    }.get(value, "The values are on another scale than the rewards, or too high; `value: mean` compares all answers.")
    raise DataError(
        f"{name}: none of {len(advantages)} answers has a reward above its value (value: {value}), so none would be "
        f"learned from. {advice}{lost} The advantages:\n{histogram(advantages)}"
    )


def check_unequal(rewards: Sequence[float], value: str, name: str, lost: str = "") -> None:
    """Raise DataError, with the histogram, where all rewards are equal. `lost`: what `max_length` left out."""
    if max(rewards) - min(rewards) > ROUNDING * max(map(abs, rewards)):
        return
    raise DataError(
        f"{name}: all {len(rewards)} rewards are equal, up to rounding, so none beats what is expected of its prompt "
        f"(value: {value}), and none would be learned from.{lost} The rewards:\n{histogram(rewards)}"
    )


def check_weights(weights: Sequence[float], name: str) -> None:
    """Raise DataError where no weight is large enough for fp32 to train with."""
    largest = max(map(abs, weights))
    if 0 < largest < _SMALLEST:
        raise DataError(
            f"{name}: the largest weight of an answer is {largest:.3g}; below {_SMALLEST:g}, gradients vanish in fp32. "
            "Scale the rewards up, to [0, 1], say."
        )
