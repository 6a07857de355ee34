"""Settings of the policy gradient trainers: the parts of the estimator, QAE's and HPT's presets."""

from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from trl import GRPOConfig

from posttrain.checks import check_choice
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.mechanisms.group_rewards import LOSS_TYPES
from posttrain.run.config import CommonConfig
from posttrain.trainers.policy_gradient import setting_checks
from posttrain.trainers.policy_gradient.estimator_settings import NO_CLIP, compile_parts, resolve

ADVANTAGES = ("group_mean", "quantile", "leave_one_out", "reward")
DEMONSTRATION_LOSSES = ("sft", "luffy", "srft")


@dataclass(repr=False)
class PolicyGradientConfig(CommonConfig, GRPOConfig):
    """Settings of `PolicyGradientTrainer`: those of `trl.GRPOConfig` and the ones below.

    At the defaults it is TRL's GRPOTrainer bit for bit, with `prefix_sharing: never` and `drop_zero_advantage_rows:
    false`. It is its family's config: every method on rollouts has these settings, and `_read` is free for its own.

    Raises:
        ConfigError: (a ValueError) a value out of range, or settings that exclude each other.
    """

    estimator: str | dict | None = setting(
        None,
        "A method by name (grpo, dapo, dr_grpo, gspo, cispo, qae, hpt_rollouts, ...) or a mapping of parts "
        "(preset, reference, stability, shaping, level, aggregate, ratio_min, ratio_max, ...). Sets loss_type, "
        "scale_rewards, the clip range and the advantage.",
        identity="token_weight_parts",
        card=True,
    )
    advantage: str = setting(
        "group_mean",
        "Baseline of the advantage: group_mean, quantile, leave_one_out, reward (none), or a function of "
        "your own as my_module:my_function, called with rewards (prompts, G) and returning as many advantages.",
        identity=True,
        card=True,
    )
    quantile: float | None = setting(
        None,
        "K of advantage: quantile, in (0, 1). null is the group mean, in QAEConfig only.",
        identity=True,
        card=True,
    )
    quantile_interpolation: str = setting(
        "inverted_cdf", "inverted_cdf (exact), or linear as the published code has it.", identity=True, card=True
    )
    gamma: float | None = setting(
        None,
        "Prompts of which at most this share of rollouts succeeds learn from their demonstration instead, "
        "in [0, 1]. null closes the gate.",
        identity=True,
        card=True,
    )
    soft_gate: list[list[float]] | str | None = setting(
        None,
        "Instead of gamma: for 0, 1, ... G successes a list [rollouts, off_policy, sft] of weights of the "
        "rollouts, of the demonstration as off-policy row, and of the demonstration as SFT row.",
        identity=True,
        card=True,
    )
    success_threshold: float | None = setting(
        None,
        "A rollout succeeds from this reward on. null is 1.0, and with a gate stops at a reward that is "
        "neither 0 nor 1.",
        identity="least_success",
        card=True,
    )
    success_reward: str | None = setting(
        None,
        "Name of the reward function that success is read from. Default: the weighted sum.",
        identity=True,
        card=True,
    )
    demonstration_loss: str = setting(
        "sft",
        "Gradient of the off-policy part of a demonstration, of the weights off_policy of soft_gate: luffy "
        "(shaped by p / (p + 0.1)) or srft (by the likelihood). sft: demonstrations have no such part.",
        identity=True,
        card=True,
    )
    sft_normalization: str = setting(
        "unified",
        "Weight of a demonstration: unified (one more row of the policy gradient), prompt (its token mean "
        "counts as a prompt) or token (the mean over all demonstration tokens).",
        identity=True,
        card=True,
    )
    sft_coef: float = setting(1.0, "Factor on the demonstrations' part, 0 or more.", identity=True, card=True)
    empty_demonstrations: str = setting(
        "error",
        "What a gated prompt without demonstration does: error, or rollouts (as without the gate).",
        identity=True,
        card=True,
    )
    long_demonstrations: str = setting(
        "error",
        "What a demonstration beyond max_completion_length does: error, or truncate (without its end).",
        identity=True,
        card=True,
    )
    drop_zero_advantage_rows: bool = setting(
        True,
        "Leave rows without gradient out of the update, where the loss has no KL, entropy or auxiliary "
        "term. The gradient is the same.",
        identity=False,
        card=True,
    )
    prefix_sharing: str = setting(
        "auto", "Compute a prompt once for all of its rollouts: auto, always or never.", identity=False, card=True
    )
    check_reference: bool = setting(
        True,
        "With beta above 0: stop where policy and reference, meant to be the same weights, differ before "
        "the first step.",
        identity=False,
        card=True,
    )
    skip_grad_norm: float | None = setting(
        None,
        "Skip the optimiser step where the gradient's norm before clipping exceeds this.",
        identity=True,
        card=True,
    )
    eval_greedy: bool | None = setting(
        None,
        "Evaluation also answers each prompt once without sampling. Not with vLLM; a rollout_func has to "
        "read trainer.generation_config for it. Default: where several answers a prompt are drawn, so that it adds "
        "little, and no rollout_func draws them.",
        identity=False,
        card=True,
    )
    kept_tokens: list[str] | None = setting(
        None,
        "Special tokens that stay in the text of completions, as rewards and logs see it. Default: those "
        "that a reward looks for. An empty list: none, as TRL has it.",
        identity=True,
        card=True,
    )
    max_steps_without_gradient: int = setting(
        100,
        "Stop, with the cause, after so many generations running without any gradient. 0: never.",
        identity=False,
        card=True,
    )

    always_in_card: ClassVar = ("beta",)
    nulls: ClassVar = {
        "quantile": "the baseline is the group's mean",
        "gamma": "no prompt learns from its demonstration by the share of successes",
        "epsilon_high": "as epsilon",
        "max_completion_length": "as long as the model's generation settings allow",
        "shuffle_dataset": "in the order of the data set",
        "vllm_importance_sampling_clip_max": "no upper bound",
    }
    says: ClassVar = ("advantage", "quantile", "gamma")
    renamed: ClassVar = {
        "drop_dead_rows": "drop_zero_advantage_rows", "max_dead_steps": "max_steps_without_gradient",
    }  # fmt: skip

    def _read_family(self):
        self.weighs_tokens = False
        if self.estimator is not None:
            self._compile_estimator()
        if ":" not in str(self.advantage):
            check_choice("advantage", self.advantage, (*ADVANTAGES, "my_module:my_function"))
        check_choice("quantile_interpolation", self.quantile_interpolation, ("inverted_cdf", "linear"))
        check_choice("demonstration_loss", self.demonstration_loss, DEMONSTRATION_LOSSES)
        check_choice("sft_normalization", self.sft_normalization, ("unified", "prompt", "token"))
        check_choice("empty_demonstrations", self.empty_demonstrations, ("error", "rollouts"))
        check_choice("long_demonstrations", self.long_demonstrations, ("error", "truncate"))
        check_choice("prefix_sharing", self.prefix_sharing, ("auto", "always", "never"))
        if type(self.num_generations) is not int or self.num_generations < 2:
            raise ConfigError(
                f"num_generations is {self.num_generations}; an advantage compares rollouts of one prompt, so it must "
                "be 2 or more."
            )
        setting_checks.check_quantile(self)
        setting_checks.check_gate(self)
        for name in ("sft_coef", "max_steps_without_gradient", "beta"):
            if not setting_checks.is_weight(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be 0 or more, and finite.")
        if not setting_checks.is_number(self.least_success):
            raise ConfigError(
                f"success_threshold is {self.success_threshold!r}; it must be a finite number, the least reward of a "
                "success."
            )
        if self.skip_grad_norm is not None:
            setting_checks.check_skipping(self)
        setting_checks.check_rewards(self)
        setting_checks.check_pairs_of_settings(self)
        self._copied_batch = setting_checks.take_copied_batch(self)

    def _unused(self):
        # a generation's rollouts reach the step one micro-batch after the other
        instead = "its micro-batches come one after the other, and SAM needs those of a step at once"
        return super()._unused() | {"sam_rho": ((0,), instead)}

    def _check_resolved(self):
        setting_checks.check_copied_batch(self, self._copied_batch)
        setting_checks.check_sampling(self)
        setting_checks.check_generation(self)
        if self.loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss_type is {self.loss_type!r}; it must be one of {', '.join(sorted(LOSS_TYPES))}.")

    def _compile_estimator(self) -> None:
        self.parts = resolve(self.estimator)
        settings, self.weighs_tokens = compile_parts(self.parts)
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name, value in settings.items():
            given = getattr(self, name)
            if given not in (defaults[name], value):
                shown = f"{value:.6g}" if isinstance(value, float) else repr(value)
                raise ExcludedSetting(
                    f"{name} is {given!r}, and estimator {self.estimator!r} sets it to {shown}. Leave one of "
                    "them out, or change the part: `estimator: {preset: ..., ...}`.",
                    {name: ("estimator",)},
                )
            setattr(self, name, value)
        if self.advantage == "quantile" and self.quantile is None:
            self.quantile = 0.4

    def inherited_in_card(self) -> dict[str, object]:
        told = super().inherited_in_card()
        if self.steps_per_generation == self.gradient_accumulation_steps:
            # as TRL fills it in
            told.pop("steps_per_generation", None)
        return told

    @property
    def token_weight_parts(self) -> dict | None:
        """Return the estimator's parts where they weigh tokens; None where TRL's settings express all of them."""
        return asdict(self.parts) if self.weighs_tokens else None

    @property
    def learns_from_demonstrations(self) -> bool:
        """Return whether a `demonstration` column is needed."""
        return self.gamma is not None or self.soft_gate is not None

    @property
    def least_success(self) -> float:
        """Return the least reward of a success."""
        return 1.0 if self.success_threshold is None else self.success_threshold

    @property
    def sampling(self) -> dict:
        """Return the settings with which rollouts are sampled."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names} | (self.generation_kwargs or {})


@dataclass(repr=False)
class QAEConfig(PolicyGradientConfig):
    """Settings of `PolicyGradientConfig` preset to quantile advantage estimation (arXiv 2509.22611) on DAPO.

    Clip range and group size are DAPO's and inferred; the quantile is the published code's.
    """

    advantage: str = "quantile"
    quantile: float | None = 0.4
    epsilon_high: float | None = 0.28
    num_generations: int | None = 16


@dataclass(repr=False)
class HPTConfig(PolicyGradientConfig):
    """Settings of `PolicyGradientConfig` preset to hybrid post-training (arXiv 2509.04419).

    Dr. GRPO's sum over tokens, no scaling of rewards, no clipping; a prompt whose rollouts all fail learns from its
    demonstration.
    """

    gamma: float | None = 0.0
    loss_type: str = "dr_grpo"
    scale_rewards: str = "none"
    epsilon: float = NO_CLIP
    learning_rate: float = 5e-6
    lr_scheduler_type: str = "constant"
