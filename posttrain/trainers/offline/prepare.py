"""What a run on scored answers needs before any weights are there: checks, tokens, weights, steps."""

import math
from collections import Counter

import torch

from posttrain.data.scored import baselines, loading
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.objectives import offline


def kept_columns(args) -> dict[str, str]:
    """The column of values, by a name of ours: theirs may be one that tokenising or training gives a meaning to."""
    if args.value != "column" or args.weighs_by != "advantages":
        return {}
    _check_value_column(args.value_column)
    return {args.value_column: "baseline"}


def check_rows(dataset, name: str, args) -> None:
    """Refuse rewards and values that the variant, or the value head, cannot take; DataError names the first."""
    if kept_columns(args):
        baselines.column_of_values(dataset, "baseline", name, args.value_column)
    if args.weighs_by == "rewards":
        rewards = dataset["reward"][:]
        loading.check_range(
            rewards, name, 0.0, math.inf,
            f"variant {args.variant} weighs answers by it, and a negative weight would push one down without bound",
            "Shift rewards to 0 and above, or take the sigmoid of a reward model's score; variants named a_lol "
            "take any reward.",
        )  # fmt: skip
    elif args.value == "head":
        loading.check_range(
            dataset["reward"][:], name, 0.0, args.reward_max,
            f"the value head's values lie between 0 and reward_max ({args.reward_max:g})",
            "Scale the rewards, take the sigmoid of a reward model's score, or set reward_max to the largest.",
        )  # fmt: skip


def check_left(dataset, name: str, args, lost: str = "") -> None:
    """Refuse rewards, of rows that fit `max_length`, that teach nothing. `lost`: what is said of the others."""
    if args.weighs_by == "rewards":
        rewards = dataset["reward"][:]
        if not any(rewards):
            raise DataError(f"{name}: all {len(rewards)} rewards are 0, so no answer would be learned from.{lost}")
        baselines.check_weights(rewards, name)
    elif args.weighs_by == "advantages" and args.value == "head":
        if args.value_targets == "answers":
            baselines.check_unequal(dataset["reward"][:], args.value, name, lost)
        check_value_prompts(len(set(baselines.prompt_keys(dataset))), name, args)


def check_value_prompts(prompts: int, name: str, args) -> None:
    """Refuse fewer prompts than folds, and say where the head will learn from few."""
    if prompts < args.value_folds:
        raise DataError(
            f"value is head with value_folds {args.value_folds}, and {name} has {prompts} different prompts. Use fewer "
            "folds, or `value: mean`."
        )
    learned = min(prompts, args.value_prompts)
    if learned < 100:
        get_logger().warning(
            "the value head learns from %d different prompts; below 100 it rarely beats `value: mean`.", learned
        )


def weights_of(advantages: list[float], args) -> list[float]:
    """The factor of each answer on its gradient."""
    advantages = torch.tensor(advantages, dtype=torch.float64)
    return offline.gradient_weights(args.variant, advantages, args.kl_beta, args.keep_negative_advantages).tolist()


def _check_value_column(column: str) -> None:
    """Refuse a column that holds something else than values."""
    if column == "reward":
        raise ConfigError(
            "value_column is 'reward': every answer's value would be its own reward, and no answer could beat it. Name "
            "a column with the rewards that are expected, or set `value: mean`."
        )
    if column in ("prompt", "completion", "chosen", "rejected", "tools", "chat_template_kwargs"):
        raise ConfigError(
            f"value_column is {column!r}, which is part of the conversation. Name a column with the rewards that are "
            "expected."
        )


def _say_single_answers(keys: list[str], name: str) -> None:
    alone = sum(count == 1 for count in Counter(keys).values())
    if alone:
        get_logger().warning(
            "%s: %d of %d answers are the only one to their prompt; with value: per_prompt their value is their own "
            "reward, so they count 0 in the loss%s. Give several answers a prompt, or use `value: mean`.",
            name, alone, len(keys), ", which is 0 throughout and says nothing" if alone == len(keys) else "",
        )  # fmt: skip
