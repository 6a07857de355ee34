"""How much each scored answer beats what is expected of its prompt: values, advantages, their histogram."""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.data import formats
from posttrain.data.lengths import measure
from posttrain.data.schema import PairReport, _check_ends
from posttrain.data.tokens import tokenizer_of
from posttrain.data.values import _described
from posttrain.errors import DataError
from posttrain.log import get_logger

# Rows whose tokens are looked at
SAMPLE = 1000
_BAR = 40


def prompt_keys(dataset) -> list[str]:
    """A text for each row that equal prompts share, and no others."""
    return [prompt_key(prompt) for prompt in dataset["prompt"]]


def prompt_key(prompt) -> str:
    """A text for a prompt, given as text or as messages."""
    return json.dumps(prompt, sort_keys=True)


def mean(rewards: Sequence[float]) -> float:
    """The mean; of equal rewards exactly that one, so that rounding makes no advantage of nothing."""
    return min(max(math.fsum(rewards) / len(rewards), min(rewards)), max(rewards))


def mean_per_prompt(keys: Sequence[str], rewards: Sequence[float]) -> list[float]:
    """The mean reward of all answers to a row's prompt, its own included."""
    grouped = defaultdict(list)
    for key, reward in zip(keys, rewards, strict=True):
        grouped[key].append(reward)
    means = {key: mean(values) for key, values in grouped.items()}
    return [means[key] for key in keys]


def column_of_values(dataset, column: str, name: str) -> list[float]:
    """A column of values; DataError for one that is no finite number, with its row."""
    values = dataset[column][:]
    for number, value in enumerate(values, 1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            shown = value if isinstance(value, float) else _described(value)
            raise DataError(f"{name}, answer {number}: {column}, the value, is {shown}; it must be a finite number.")
    return [float(value) for value in values]


def values_of(dataset, value: str, column: str | None, name: str) -> list[float]:
    """The value of each row, of those that need no model: mean, per_prompt or column."""
    if value == "column":
        return column_of_values(dataset, column, name)
    rewards = dataset["reward"][:]
    if value == "per_prompt":
        return mean_per_prompt(prompt_keys(dataset), rewards)
    return [math.fsum(rewards) / len(rewards)] * len(rewards)


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
        """One line for the log."""
        spread = ", ".join(f"{value:.3g}" for value in self.quantiles)
        return (
            f"{self.kept} of {self.rows} answers have a gradient; {self.positive:.1%} beat their value; advantages: "
            f"mean {self.mean:.3g}, quartiles {spread}; they weigh as {self.effective:.0f} equal ones"
        )


def describe(advantages: Sequence[float], weights: Sequence[float]) -> Advantages:
    """`weights`: the factor of each answer on its gradient; 0 for one that is dropped."""
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


def histogram(values: Sequence[float], bins: int = 8) -> str:
    """Counts over equal spans as lines of text: the span, the count, a bar."""
    low, high = min(values), max(values)
    if low == high:
        return f"  {low:9.3g}  {len(values):>7} {'#' * _BAR}"
    width = (high - low) / bins
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    lines = []
    for i, count in enumerate(counts):
        bar = "#" * math.ceil(_BAR * count / max(counts))
        lines.append(f"  {low + i * width:9.3g} to {low + (i + 1) * width:9.3g}  {count:>7} {bar}")
    return "\n".join(line.rstrip() for line in lines)


def check_positive(advantages: Sequence[float], value: str, name: str) -> None:
    """Raise DataError, with the histogram, where no answer beats its value."""
    if any(advantage > 0 for advantage in advantages):
        return
    advice = {
        "per_prompt": "The mean over a prompt's answers needs several of them with different rewards; `value: mean` "
        "compares all answers.",
        "mean": "All rewards are equal, so there is nothing to tell answers apart by.",
    }.get(value, "The values are on another scale than the rewards, or too high; `value: mean` compares all answers.")
    raise DataError(
        f"{name}: none of {len(advantages)} answers has a reward above its value (value: {value}), so none would be "
        f"learned from. {advice} The advantages:\n{histogram(advantages)}"
    )


def check_tokens(dataset, processing_class, max_length: int | None, name: str, stop_ids=()) -> None:
    """What `max_length` leaves of scored answers, and whether they end the turn; on a sample of up to 1000 rows.

    Raises DataError where every row looked at loses its whole answer, no answer ends the turn, or a row cannot be
    rendered; ConfigError for a tokenizer without chat template or eos token. Says in the log what else is found.
    """
    rows = len(dataset)
    sample = dataset if rows <= SAMPLE else dataset.select([i * rows // SAMPLE for i in range(SAMPLE)])
    places = [f"{name}, answer {i * rows // len(sample) + 1}" for i in range(len(sample))]
    # both sides of a pair, as the pairs' tokeniser takes them
    columns = [column for column in ("prompt", "tools", "chat_template_kwargs") if column in sample.column_names]
    pairs = sample.select_columns([*columns, "completion"]).rename_column("completion", "chosen")
    pairs = pairs.add_column("rejected", sample["completion"][:])
    lengths = measure(pairs, processing_class, places, max_length, keep_start=True)
    advice = f"max_length {lengths.keeps_99} keeps 99% of the rows, {lengths.whole_99} keeps 99% of them whole"
    if lengths.dropped == lengths.rows:
        raise DataError(
            f"{name}: max_length is {max_length}, and every prompt looked at is that long "
            f"({lengths.shortest_prompt} to {lengths.parts['prompt']['max']} tokens), so no answer would be left to "
            f"learn from; {advice}."
        )
    if lengths.dropped or lengths.cut:
        get_logger().warning(
            "%s: of %d rows looked at, max_length %s leaves nothing of %d answers and cuts %d; %s.",
            name, lengths.rows, max_length, lengths.dropped, lengths.cut, advice,
        )  # fmt: skip
    report = PairReport(name, formats.Format("scored", "", ""), rows, 0, 0, [], max_length, lengths)
    _check_ends(report, tokenizer_of(processing_class), set(stop_ids))
    for warning in report.warnings:
        get_logger().warning("%s", warning)
