"""Rewards for reinforcement learning, callable as TRL's reward functions and nameable in a config.

    rewards = get_rewards(["maths_answer", "length?max_length=512&cache=128", "my_module:my_function"])
    for reward in rewards:
        reward.start()                      # workers, before the model loads
    check_golds(dataset, "gold", rewards[0])
    GRPOTrainer(..., reward_funcs=rewards)

This package and what it imports at once are the standard library only: the workers import it too.
"""

from posttrain.rewards.base import Reward, check_golds
from posttrain.rewards.format import Format
from posttrain.rewards.gym import GymScore
from posttrain.rewards.length import OverlongPenalty
from posttrain.rewards.maths import ExactMatch, MathsAnswer
from posttrain.rewards.registry import get_reward, get_rewards
from posttrain.rewards.user import UserReward

__all__ = [
    "ExactMatch",
    "Format",
    "GymScore",
    "MathsAnswer",
    "OverlongPenalty",
    "Reward",
    "UserReward",
    "check_golds",
    "get_reward",
    "get_rewards",
]
