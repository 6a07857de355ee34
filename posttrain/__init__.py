"""Post-training for data that is noisy, scarce or private.

The names below are imported when first used, so that `import posttrain` is fast and loads no torch.
"""

import importlib

from posttrain import former_names

__version__ = "0.1.0"

_MODULES = {
    "ALoLConfig": "posttrain.trainers.offline.a_lol",
    "ALoLTrainer": "posttrain.trainers.offline.a_lol",
    "HPTConfig": "posttrain.trainers.policy_gradient.trainers",
    "HPTTrainer": "posttrain.trainers.policy_gradient.trainers",
    "NoisySFTConfig": "posttrain.trainers.sft.noisy_sft",
    "NoisySFTTrainer": "posttrain.trainers.sft.noisy_sft",
    "PolicyGradientConfig": "posttrain.trainers.policy_gradient.trainers",
    "PolicyGradientTrainer": "posttrain.trainers.policy_gradient.trainers",
    "QAEConfig": "posttrain.trainers.policy_gradient.trainers",
    "QAETrainer": "posttrain.trainers.policy_gradient.trainers",
    "RobustDPOConfig": "posttrain.trainers.preference.robust_dpo",
    "RobustDPOTrainer": "posttrain.trainers.preference.robust_dpo",
}
__all__ = ["__version__", *_MODULES]
former_names.register()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
