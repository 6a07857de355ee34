"""The rewards of scored answers and what they beat, drawn before anything is trained."""

import math

from posttrain.console import say
from posttrain.errors import ConfigError, DataError
from posttrain.tables import bars
from posttrain.visible import listed

VALUES = ("mean", "per_prompt", "column")
BINS = 8


def add_options(parser) -> None:
    """Add the options of `data stats` about rewards."""
    parser.add_argument(
        "--reward-column", "--reward_column", metavar="NAME", help="the column of rewards, if not reward"
    )
    parser.add_argument("--value", choices=VALUES, default="mean", help="what rewards are compared with; default: mean")
    parser.add_argument(
        "--value-column", "--value_column", metavar="NAME", help="for --value column: baseline if not given"
    )


def facts(args, columns: list[str], first: dict) -> dict:
    """Describe the rewards, and the advantages over a value, of a source that holds scored answers.

    Empty where it holds none.

    Returns: rewards and advantages (counts, means, quartiles, histograms as [low, high, count]), or a warning under
    `not_drawn` where a reward or value is none.

    Raises:
        ConfigError: a value column without `--value column`. DataError: the column named is missing.
    """
    from posttrain.data import generators
    from posttrain.data.pairs.sides import scores_of
    from posttrain.data.scored import baselines
    from posttrain.data.scored.loading import load_scored

    if args.value_column is not None and args.value != "column":
        raise ConfigError(f"--value-column is {args.value_column}, which only --value column reads. Add that.")
    pairs = scores_of(columns) is not None
    labelled = "completion" in columns and type(first.get("label")) is bool
    made_pairs = generators.is_made(args.source) and "rejected" in columns
    if not (args.reward_column or "reward" in columns or pairs or labelled or made_pairs):
        other = next((name for name in ("score", "rating", "rewards", "scores") if name in columns), None)
        if "completion" in columns and other:
            return {"not_drawn": f"rewards are not drawn: is {other!r} their column? Then add --reward-column {other}."}
        return {}
    renamed = {args.reward_column: "reward"} if args.reward_column not in (None, "reward") else None
    column = (args.value_column or "baseline") if args.value == "column" else None
    if column is not None and column not in columns:
        raise DataError(f"{args.source} has no column {column!r}. Found: {listed(columns)}. Name it: --value-column.")
    try:
        keep = (column,) if column else ()
        rows = load_scored(args.source, args.split, args.limit, renamed, keep=keep, convert=not args.as_is)
        values = baselines.values_of(rows, args.value, column, args.source)
    except DataError as error:
        if args.reward_column is not None or column is not None:
            raise
        return {"not_drawn": f"rewards are not drawn: {error}"}
    rewards = rows["reward"][:]
    advantages = baselines.advantages_of(rewards, values)
    positive = sum(advantage > 0 for advantage in advantages)
    named = {"value": args.value} | ({"column": column} if column else {})
    return {
        "rewards": _distribution(rewards),
        "advantages": named | _distribution(advantages) | {"positive_share": positive / len(advantages)},
    }


def draw(found: dict) -> None:
    """Print what `facts` found."""
    if not found or "not_drawn" in found:
        return
    rewards, advantages = found["rewards"], found["advantages"]
    say("\nOf all rows, whatever max_length leaves of them:", end="")
    say(f"\nrewards of {rewards['answers']} answers, mean {rewards['mean']:.3g}:\n{bars(rewards['histogram'])}")
    what = {
        "mean": "their mean",
        "per_prompt": "the mean of the prompt's answers",
        "column": f"the column {advantages.get('column')}",
    }[advantages["value"]]
    share = advantages["positive_share"]
    say(f"advantages over {what}, {share:.1%} of them above 0:\n{bars(advantages['histogram'])}")


def _distribution(values: list[float]) -> dict:
    import numpy as np

    counts, edges = np.histogram(values, bins=1 if min(values) == max(values) else BINS)
    if min(values) == max(values):
        edges = [values[0], values[0]]
    spans = [[float(edges[i]), float(edges[i + 1]), int(count)] for i, count in enumerate(counts)]
    quartiles = [float(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]
    return {
        "answers": len(values),
        "mean": math.fsum(values) / len(values),
        "min": min(values),
        "max": max(values),
        "quartiles": quartiles,
        "histogram": spans,
    }
