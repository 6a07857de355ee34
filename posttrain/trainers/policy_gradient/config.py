"""Settings of the policy gradient trainers: the parts of the estimator, QAE's and HPT's presets."""

import math
from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from trl import GRPOConfig

from posttrain.checks import check_choice, shorten
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.log import get_logger
from posttrain.mechanisms.group_rewards import LOSS_TYPES
from posttrain.objectives.advantages import order_statistic
from posttrain.run.config import CommonConfig, under_deepspeed
from posttrain.trainers.policy_gradient.estimator_settings import NO_CLIP, compile_parts, resolve

ADVANTAGES = ("group_mean", "quantile", "leave_one_out", "reward")
DEMONSTRATION_LOSSES = ("sft", "luffy", "srft")


@dataclass
class PolicyGradientConfig(CommonConfig, GRPOConfig):
    """Settings of `PolicyGradientTrainer`: those of `trl.GRPOConfig` and the ones below.

    At the defaults it is TRL's GRPOTrainer bit for bit, with `prefix_sharing: never` and `drop_zero_advantage_rows:
    false`.

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

    says: ClassVar = ("advantage", "quantile", "gamma")
    renamed: ClassVar = {
        "drop_dead_rows": "drop_zero_advantage_rows", "max_dead_steps": "max_steps_without_gradient",
    }  # fmt: skip

    def _read(self):
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
        if self.num_generations < 2:
            raise ConfigError(
                f"num_generations is {self.num_generations}; an advantage compares rollouts of one prompt, so it must "
                "be 2 or more."
            )
        self._check_quantile()
        self._check_gate()
        for name in ("sft_coef", "max_steps_without_gradient", "beta"):
            if not _is_weight(getattr(self, name)):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be 0 or more, and finite.")
        if not _is_number(self.least_success):
            raise ConfigError(
                f"success_threshold is {self.success_threshold!r}; it must be a finite number, the least reward of a "
                "success."
            )
        if self.skip_grad_norm is not None:
            self._check_skipping()
        self._check_rewards()
        self._check_pairs_of_settings()

    def _check_resolved(self):
        self._check_sampling()
        if self.loss_type not in LOSS_TYPES:
            raise ConfigError(f"loss_type is {self.loss_type!r}; it must be one of {', '.join(sorted(LOSS_TYPES))}.")

    def _compile_estimator(self) -> None:
        self.parts = resolve(self.estimator)
        settings, self.weighs_tokens = compile_parts(self.parts)
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name, value in settings.items():
            given = getattr(self, name)
            if given not in (defaults[name], value):
                raise ExcludedSetting(
                    f"{name} is {given!r}, and estimator {self.estimator!r} sets it to {value!r}. Leave one of "
                    "them out, or change the part: `estimator: {preset: ..., ...}`.",
                    {name: ("estimator",)},
                )
            setattr(self, name, value)
        if self.advantage == "quantile" and self.quantile is None:
            self.quantile = 0.4

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

    def _check_rewards(self) -> None:
        weights = self.reward_weights
        if weights is not None and not (isinstance(weights, list | tuple) and all(map(_is_number, weights))):
            raise ConfigError(
                f"reward_weights is {shorten(weights)}; it must be a list of finite numbers, one for each reward "
                "function."
            )
        kept = self.kept_tokens
        if kept is not None and not (isinstance(kept, list | tuple) and all(isinstance(one, str) for one in kept)):
            raise ConfigError(f"kept_tokens is {shorten(kept)}; it must be a list of tokens, such as ['<think>'].")
        if self.eval_greedy and self.use_vllm:
            raise ExcludedSetting(
                "eval_greedy is true with use_vllm, whose sampling is set once for the run. Leave eval_greedy out.",
                {"eval_greedy": ("use_vllm",)},
            )

    def _check_skipping(self) -> None:
        if not self.skip_grad_norm > 0:
            raise ConfigError(f"skip_grad_norm is {self.skip_grad_norm}; it must be above 0, or be left out.")
        if under_deepspeed(self):
            raise ConfigError(
                f"skip_grad_norm is {self.skip_grad_norm} under DeepSpeed, which steps before the norm is known here. "
                "Leave it out; max_grad_norm still clips."
            )
        if not self.max_grad_norm > 0:
            raise ExcludedSetting(
                f"skip_grad_norm is {self.skip_grad_norm} and max_grad_norm is {self.max_grad_norm}, with which no "
                "norm is computed. Set max_grad_norm above 0; a large one never clips.",
                {"skip_grad_norm": ("max_grad_norm",)},
            )

    def _check_pairs_of_settings(self) -> None:
        if self.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {self.label_smoothing_factor}, which this trainer does not use. Leave it "
                "out."
            )
        if self.log_completions_hub_repo is not None and not self.log_completions:
            raise ExcludedSetting(
                f"log_completions_hub_repo is {self.log_completions_hub_repo} and log_completions is false, so there "
                "is no table to send. Set `log_completions: true`, or leave log_completions_hub_repo out.",
                {"log_completions_hub_repo": ("log_completions",)},
            )
        # TRL's config sets both from either
        if not self._resolved_upstream and None not in (self.generation_batch_size, self.steps_per_generation):
            raise ExcludedSetting(
                f"generation_batch_size is {self.generation_batch_size} and steps_per_generation is "
                f"{self.steps_per_generation}; each follows from the other. Leave one of them out.",
                {
                    "generation_batch_size": ("steps_per_generation",),
                    "steps_per_generation": ("generation_batch_size",),
                },
            )

    @property
    def sampling(self) -> dict:
        """Return the settings with which rollouts are sampled."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names} | (self.generation_kwargs or {})

    def _check_sampling(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(
                f"temperature is {self.temperature}; it must be above 0, rollouts of a prompt must differ."
            )
        if "temperature" in (self.generation_kwargs or {}):
            raise ConfigError(
                "generation_kwargs sets temperature, of which the log-probabilities in training would not know. Set "
                "`temperature` instead."
            )
        neutral = {"top_p": (1.0, None), "top_k": (0, None, -1), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
        sampling = self.sampling
        changed = [f"{name} is {sampling[name]}" for name, values in neutral.items() if sampling[name] not in values]
        if not changed:
            return
        found = f"{', '.join(changed)}, so rollouts are drawn from another distribution than the model's own"
        if self.use_vllm and self.vllm_importance_sampling_correction:
            raise ConfigError(
                f"{found}, and the ratio between vLLM's log-probabilities and the trainer's would correct for it token "
                "by token as if it were an error. Leave it at its default, or set "
                "`vllm_importance_sampling_correction: false`."
            )
        get_logger().warning("%s; the gradient does not account for it", found)

    def _check_quantile(self) -> None:
        if self.quantile is None:
            # where the preset has a quantile, null was chosen
            if self.advantage == "quantile" and type(self).quantile is None:
                raise ConfigError(
                    "advantage is quantile, and quantile is not set. Set `quantile: 0.4`, or `advantage: group_mean`."
                )
            return
        if self.advantage != "quantile":
            self._has_no_effect(
                "quantile",
                None,
                ("advantage", "estimator"),
                f"quantile is {self.quantile}, which has no effect on advantage: {self.advantage}. Set "
                "`advantage: quantile`, or leave quantile out.",
            )
            return
        if isinstance(self.quantile, bool | str) or not 0 < self.quantile < 1:
            raise ConfigError(
                f"quantile is {self.quantile!r}; it must lie in (0, 1), 0.4 is usual; null is the group mean."
            )
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ExcludedSetting(
                f"multi_objective_aggregation is {self.multi_objective_aggregation} with a quantile of the summed "
                "reward. Set `multi_objective_aggregation: sum_then_normalize`, or `quantile: null`.",
                {"multi_objective_aggregation": ("quantile", "advantage", "estimator")},
            )
        place = order_statistic(self.quantile, self.num_generations)
        if place in (1, self.num_generations):
            get_logger().warning(
                "quantile %s of %d rollouts is the %s of them, so no advantage is %s",
                self.quantile,
                self.num_generations,
                *(("least", "below 0") if place == 1 else ("greatest", "above 0")),
            )

    def _check_gate(self) -> None:
        if self.gamma is not None and (isinstance(self.gamma, bool | str) or not 0 <= self.gamma <= 1):
            raise ConfigError(f"gamma is {self.gamma!r}; it is a share of rollouts, in [0, 1]; null closes the gate.")
        self._check_soft_gate()
        if not self.learns_from_demonstrations:
            return
        if self.gamma is not None and self.soft_gate is not None:
            if "gamma" in self._written:
                raise ExcludedSetting(
                    "gamma and soft_gate are both set; a prompt has one gate. Leave one of them out.",
                    {"gamma": ("soft_gate",), "soft_gate": ("gamma",)},
                )
            # a preset's own
            self.gamma = None
        if self.sft_normalization != "unified" and self.loss_type == "bnpo":
            raise ExcludedSetting(
                f"sft_normalization is {self.sft_normalization} with loss_type bnpo, whose weight of a token depends "
                "on the micro-batch. Set `sft_normalization: unified`, or another loss_type.",
                {"sft_normalization": ("loss_type",), "loss_type": ("sft_normalization",)},
            )
        for name, value, neutral, why in (
            ("top_entropy_quantile", self.top_entropy_quantile, 1.0, "it would mask tokens of demonstrations"),
            ("off_policy_mask_threshold", self.off_policy_mask_threshold, None, "it would mask demonstrations"),
            ("importance_sampling_level", self.importance_sampling_level, "token", "demonstrations weigh tokens"),
        ):
            if value != neutral:
                raise ExcludedSetting(
                    f"{name} is {value} with a gate for demonstrations; {why}. Leave {name} out.",
                    {name: ("gamma", "soft_gate")},
                )

    def _check_soft_gate(self) -> None:
        rows = () if self.soft_gate is None else self.soft_gate
        good = isinstance(rows, list | tuple) and all(
            isinstance(row, list | tuple) and len(row) == 3 and all(map(_is_weight, row)) for row in rows
        )
        if not good or (self.soft_gate is not None and len(rows) != self.num_generations + 1):
            raise ConfigError(
                f"soft_gate must have {self.num_generations + 1} rows (for 0 to num_generations successes) of "
                "three finite weights of 0 or more: rollouts, off-policy demonstration, SFT demonstration. It is "
                f"{shorten(self.soft_gate)}."
            )
        off_policy = any(row[1] > 0 for row in rows)
        if off_policy and self.demonstration_loss == "sft":
            raise ConfigError(
                "soft_gate has weights of off-policy demonstrations, and demonstration_loss is sft, which says nothing "
                "of them. Set `demonstration_loss: luffy` or `srft`, or use the third weight."
            )
        if not off_policy and self.demonstration_loss != "sft":
            raise ExcludedSetting(
                f"demonstration_loss is {self.demonstration_loss}, which has no effect without off-policy weights in "
                "soft_gate: a demonstration of gamma is an SFT row. Set such weights, or leave demonstration_loss out.",
                {"demonstration_loss": ("soft_gate", "gamma")},
            )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_weight(value) -> bool:
    return _is_number(value) and value >= 0


@dataclass
class QAEConfig(PolicyGradientConfig):
    """Settings of `PolicyGradientConfig` preset to quantile advantage estimation (arXiv 2509.22611) on DAPO.

    Clip range and group size are DAPO's and inferred; the quantile is the published code's.
    """

    advantage: str = "quantile"
    quantile: float | None = 0.4
    epsilon_high: float | None = 0.28
    num_generations: int | None = 16


@dataclass
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
