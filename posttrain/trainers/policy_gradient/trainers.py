"""Policy gradients with interchangeable parts, and their two presets: quantile advantages (QAE), hybrid (HPT)."""

from trl import GRPOTrainer

from posttrain.trainers.policy_gradient.config import HPTConfig, PolicyGradientConfig, QAEConfig
from posttrain.trainers.policy_gradient.mixin import PolicyGradientMixin


class PolicyGradientTrainer(PolicyGradientMixin, GRPOTrainer):
    """Trains `trl.GRPOTrainer` by any advantage of a group's rewards, by demonstrations, without zero-advantage rows.

    Takes what `trl.GRPOTrainer` takes, with a `PolicyGradientConfig` as `args`.

    Raises:
        ConfigError, DataError: (ValueErrors) bad settings, missing columns, unusable demonstrations; before the model
            loads.
        TypeError: `args` of another class.
    """

    _config_class = PolicyGradientConfig
    _name = "Policy gradient"
    _tag_names = ["trl", "posttrain", "policy_gradient", "grpo"]


class QAETrainer(PolicyGradientMixin, GRPOTrainer):
    """Trains by quantile advantage estimation (arXiv 2509.22611): a group's quantile is the baseline, not its mean."""

    _config_class = QAEConfig
    _name = "QAE"
    _tag_names = ["trl", "posttrain", "qae", "grpo"]
    _paper = {
        "title": "Quantile Advantage Estimation for Entropy-Safe Reasoning",
        "id": "2509.22611",
        "citation": """@article{qae2025,
    title   = {{Quantile Advantage Estimation for Entropy-Safe Reasoning}},
    year    = 2025,
    eprint  = {arXiv:2509.22611},
}""",
    }


class HPTTrainer(PolicyGradientMixin, GRPOTrainer):
    """Trains by hybrid post-training (arXiv 2509.04419): prompts whose rollouts fail learn from a demonstration."""

    _config_class = HPTConfig
    _name = "HPT"
    _tag_names = ["trl", "posttrain", "hpt", "grpo"]
    _paper = {
        "title": "Towards a Unified View of Large Language Model Post-Training",
        "id": "2509.04419",
        "citation": """@article{hpt2025,
    title   = {{Towards a Unified View of Large Language Model Post-Training}},
    year    = 2025,
    eprint  = {arXiv:2509.04419},
}""",
    }
