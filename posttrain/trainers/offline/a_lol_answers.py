"""Scored answers as A-LoL takes them: what their rewards and values may be, and each one's weight on the gradient."""

import math
from collections import Counter

import torch

from posttrain.data.scored import baselines, scales
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.objectives import offline
from posttrain.trainers.offline import prompt_values
from posttrain.trainers.offline.prepare import Answers


class ALoLAnswers(Answers):
    """Checks and weighs the rows of an A-LoL run.

    Attributes:
        advantages: what the training rows' advantages are like; None before they are known, or where none are.
    """

    def __init__(self, args, reward_func=None) -> None:
        super().__init__(args, reward_func)
        self.advantages: baselines.Advantages | None = None
        self._mean_reward: float | None = None

    @property
    def weighed_late(self) -> bool:
        return self.args.value == "head" or super().weighed_late

    @property
    def has_head(self) -> bool:
        return self.args.weighs_by == "advantages" and self.args.value == "head"

    def kept_columns(self) -> dict[str, str]:
        """Return the user's column of values under a name of ours; theirs may mean something to TRL."""
        if self.args.value != "column" or self.args.weighs_by != "advantages":
            return {}
        _check_value_column(self.args.value_column)
        return {self.args.value_column: "baseline"}

    def check_rows(self, dataset, name: str) -> None:
        """Refuse rewards and values that the variant, or the value head, cannot take; DataError names the first."""
        args = self.args
        if self.kept_columns():
            baselines.column_of_values(dataset, "baseline", name, args.value_column)
        if args.weighs_by == "rewards":
            scales.check_range(
                dataset["reward"][:], name, 0.0, math.inf,
                f"variant {args.variant} weighs answers by it, and a negative weight would push one down without bound",
                "Shift rewards to 0 and above, or take the sigmoid of a reward model's score; variants named a_lol "
                "take any reward.",
            )  # fmt: skip
        elif args.value == "head":
            scales.check_range(
                dataset["reward"][:], name, 0.0, args.reward_max,
                f"the value head's values lie between 0 and reward_max ({args.reward_max:g})",
                "Scale the rewards, take the sigmoid of a reward model's score, or set reward_max to the largest.",
            )  # fmt: skip
        if self.has_head and name == "train_dataset":
            prompt_values.check_heads_can_be_kept(args, self.reward_func)

    def check_left(self, dataset) -> None:
        """Refuse training rewards from which nothing can be learned, of rows that fit `max_length`."""
        args, name = self.args, "train_dataset"
        if args.weighs_by == "rewards":
            rewards = dataset["reward"][:]
            if not any(rewards):
                raise DataError(
                    f"{name}: all {len(rewards)} rewards are 0, so no answer would be learned from.{self.lost}"
                )
            baselines.check_weights(rewards, name)
        elif self.has_head:
            if args.value_targets == "answers":
                baselines.check_unequal(dataset["reward"][:], args.value, name, self.lost)
            self.check_value_prompts(len(set(baselines.prompt_keys(dataset))), name)

    def check_value_prompts(self, prompts: int, name: str) -> None:
        """Refuse fewer prompts than folds, and warn where the value head will learn from few."""
        args = self.args
        if prompts < args.value_folds:
            raise DataError(
                f"value is head with value_folds {args.value_folds}, and {name} has {prompts} different prompts. Use "
                "fewer folds, or `value: mean`."
            )
        learned = min(prompts, args.value_prompts)
        if learned < 100:
            get_logger().warning(
                "the value head learns from %d different prompts; below 100 it rarely beats `value: mean`.", learned
            )

    def weigh(self, dataset, name: str, trainer=None):
        args = self.args
        if args.weighs_by is None:
            return dataset.add_column("weight", [1.0] * len(dataset))
        rewards = dataset["reward"][:]
        if args.weighs_by == "rewards":
            return dataset.add_column("weight", rewards)
        advantages = baselines.advantages_of(rewards, self._expected_rewards(dataset, rewards, name, trainer))
        weights = weights_of(advantages, args)
        if name == "train_dataset":
            baselines.check_positive(advantages, args.value, name, self.lost)
            baselines.check_weights(weights, name)
            self.advantages = baselines.summarise(advantages, weights)
            get_logger().info("%s: %s", name, self.advantages.summary())
        return dataset.add_column("advantage", advantages).add_column("weight", weights)

    def _expected_rewards(self, dataset, rewards: list[float], name: str, trainer) -> list[float]:
        """Return the expected reward V(x) of each row's prompt.

        Of held-out rows from what the training rows taught for `mean` and `head`; `per_prompt` and `column` read
        these rows' own.
        """
        value = self.args.value
        if value == "mean":
            if self._mean_reward is None:
                self._mean_reward = baselines.mean(rewards)
            return [self._mean_reward] * len(rewards)
        if value == "per_prompt" and name != "train_dataset":
            _warn_of_single_answers(baselines.prompt_keys(dataset), name)
        if value != "head":
            return baselines.values_of(dataset, value, "baseline", name)
        return prompt_values.of_head(trainer, dataset, rewards, name)


def weights_of(advantages: list[float], args) -> list[float]:
    """Return the factor of each answer on its gradient."""
    advantages = torch.tensor(advantages, dtype=torch.float64)
    return offline.gradient_weights(args.variant, advantages, args.kl_beta, args.keep_negative_advantages).tolist()


def _check_value_column(column: str) -> None:
    """Refuse the name of a column that holds something else than values."""
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


def _warn_of_single_answers(keys: list[str], name: str) -> None:
    alone = sum(count == 1 for count in Counter(keys).values())
    if alone:
        get_logger().warning(
            "%s: %d of %d answers are the only one to their prompt; with value: per_prompt their value is their own "
            "reward, so they count 0 in the loss%s. Give several answers a prompt, or use `value: mean`.",
            name, alone, len(keys), ", which is 0 throughout and says nothing" if alone == len(keys) else "",
        )  # fmt: skip
