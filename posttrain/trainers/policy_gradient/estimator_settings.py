"""An estimator's parts as settings of TRL's loss, and as weights on tokens where TRL's loss has no setting for them."""

from dataclasses import fields, replace

from posttrain.errors import ConfigError
from posttrain.objectives.estimators import PRESETS, Estimator

# Without a clip a ratio is never cut off; TRL has no switch for it
NO_CLIP = 1e9
_LOSS_TYPES = {"row_mean": "grpo", "token_mean": "dapo", "dr_grpo": "dr_grpo", "row_sum": "luspo"}
_ADVANTAGES = ("group_mean", "quantile", "leave_one_out", "reward")


def resolve(value: str | dict) -> Estimator:
    """Build the estimator of that name, or of those parts: `{preset: grpo, stability: clamp, ratio_max: 3.0}`."""
    parts = dict(value) if isinstance(value, dict) else {"preset": value}
    name = parts.pop("preset", "grpo")
    if name not in PRESETS:
        raise ConfigError(f"estimator is {name!r}; it must be one of {', '.join(PRESETS)}, or a mapping of parts.")
    known = [field.name for field in fields(Estimator)]
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise ConfigError(f"estimator has no part {unknown[0]!r}; its parts are preset, {', '.join(known)}.")
    try:
        return replace(PRESETS[name], **parts)
    except ValueError as error:
        raise ConfigError(f"estimator: {error}") from None


def compile_parts(parts: Estimator) -> tuple[dict, bool]:
    """Translate parts to settings of a `PolicyGradientConfig`, and whether `gradient_weight` weighs tokens as well.

    Raises:
        ConfigError: parts that rollouts cannot give, by name.
    """
    if parts.advantage not in _ADVANTAGES:
        raise ConfigError(
            f"estimator: advantage {parts.advantage!r} is not of rollouts ({', '.join(_ADVANTAGES)} are). "
            "Demonstrations come in through `gamma` or `soft_gate`; answers without rollouts need another trainer."
        )
    if parts.reference == "frozen":
        raise ConfigError(
            "estimator: reference 'frozen' is that of offline methods; rollouts have 'old', 'policy' or 'one'."
        )
    settings = {
        "loss_type": _LOSS_TYPES[parts.aggregate],
        "importance_sampling_level": "sequence" if parts.level == "sequence" else "token",
        "scale_rewards": parts.scale,
        "epsilon": NO_CLIP,
        "epsilon_high": None,
        "delta": parts.delta,
        "advantage": parts.advantage,
    }
    by_ratio = parts.reference == "old" and parts.shaping == "none" and parts.level != "product"
    if by_ratio and parts.stability == "clip":
        return settings | {"epsilon": 1 - parts.ratio_min, "epsilon_high": parts.ratio_max - 1}, False
    if by_ratio and parts.stability == "none":
        return settings, False
    cispo = parts.stability == "clamp" and parts.ratio_min is None and parts.aggregate == "token_mean"
    if by_ratio and cispo and parts.level == "token":
        return settings | {"loss_type": "cispo", "epsilon": 0.2, "epsilon_high": parts.ratio_max}, False
    return settings | {"importance_sampling_level": "token", "delta": None}, True
