"""Which settings of the policy gradient trainers are refused: out of range, without effect, or beside each other."""

import math

import torch

from posttrain.checks import shorten
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.log import get_logger
from posttrain.objectives.advantages import order_statistic
from posttrain.run.config import under_deepspeed

# Of transformers' generation, what rollouts cannot have: they are drawn in batches, by model and prompts alone
_NEEDS_TOKENIZER = "it needs the tokenizer, which is not handed on"
_ONE_AT_A_TIME = "it drafts for a single prompt, and rollouts are drawn in batches"
_MOVED = "transformers loads its code from the hub, which is not run"
_OTHER_SHAPE = "a rollout is one sequence of tokens"
_NO_ROLLOUTS = {
    "stop_strings": _NEEDS_TOKENIZER,
    "token_healing": _NEEDS_TOKENIZER,
    "prompt_lookup_num_tokens": _ONE_AT_A_TIME,
    "assistant_early_exit": _ONE_AT_A_TIME,
    "is_assistant": _ONE_AT_A_TIME,
    "use_mtp": _ONE_AT_A_TIME,
    "constraints": _MOVED,
    "custom_generate": _MOVED,
    "dola_layers": _MOVED,
    "force_words_ids": _MOVED,
    "num_beam_groups": _MOVED,
    "penalty_alpha": _MOVED,
    "return_dict_in_generate": _OTHER_SHAPE,
    "num_return_sequences": _OTHER_SHAPE,
}


def check_generation(args) -> None:
    """Refuse settings of transformers' generation with which it would fail, or give no rollouts."""
    given = dict(args.generation_kwargs or {})
    if args.use_vllm:
        return
    for name, why in _NO_ROLLOUTS.items():
        neutral = (None, False) if name not in ("num_return_sequences", "num_beam_groups") else (None, 1)
        if name in given and given[name] not in neutral:
            raise ConfigError(f"generation_kwargs sets {name} to {shorten(given[name])}; {why}. Leave it out.")
    place = "generation_kwargs sets cache_implementation to" if "cache_implementation" in given else None
    cache = given.get("cache_implementation", args.cache_implementation)
    if cache == "quantized" or (str(cache).startswith("offloaded") and not torch.cuda.is_available()):
        why = (
            "rounds what the log-probabilities come from" if cache == "quantized" else "needs a GPU, and there is none"
        )
        raise ConfigError(f"{place or 'cache_implementation is'} {cache}, a cache that {why}. Leave it out.")
    if not given:
        return
    from transformers import GenerationConfig

    try:
        GenerationConfig(**({"max_new_tokens": args.max_completion_length} | given))
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"generation_kwargs is {shorten(given)}, which transformers refuses: {reason}.") from None


def check_rewards(args) -> None:
    """Refuse reward weights and kept tokens of another type, and greedy evaluation with vLLM."""
    weights = args.reward_weights
    if weights is not None and not (isinstance(weights, list | tuple) and all(map(is_number, weights))):
        raise ConfigError(
            f"reward_weights is {shorten(weights)}; it must be a list of finite numbers, one for each reward function."
        )
    kept = args.kept_tokens
    if kept is not None and not (isinstance(kept, list | tuple) and all(isinstance(one, str) for one in kept)):
        raise ConfigError(f"kept_tokens is {shorten(kept)}; it must be a list of tokens, such as ['<think>'].")
    if args.eval_greedy and args.use_vllm:
        raise ExcludedSetting(
            "eval_greedy is true with use_vllm, whose sampling is set once for the run. Leave eval_greedy out.",
            {"eval_greedy": ("use_vllm",)},
        )


def check_skipping(args) -> None:
    """Refuse skipping steps by gradient norm where no norm is known before the step."""
    if not args.skip_grad_norm > 0:
        raise ConfigError(f"skip_grad_norm is {args.skip_grad_norm}; it must be above 0, or be left out.")
    if under_deepspeed(args):
        raise ConfigError(
            f"skip_grad_norm is {args.skip_grad_norm} under DeepSpeed, which steps before the norm is known here. "
            "Leave it out; max_grad_norm still clips."
        )
    if not args.max_grad_norm > 0:
        raise ExcludedSetting(
            f"skip_grad_norm is {args.skip_grad_norm} and max_grad_norm is {args.max_grad_norm}, with which no "
            "norm is computed. Set max_grad_norm above 0; a large one never clips.",
            {"skip_grad_norm": ("max_grad_norm",)},
        )


def check_pairs_of_settings(args) -> None:
    """Refuse settings of TRL's that exclude each other, or that this trainer does not use."""
    if args.label_smoothing_factor:
        raise ConfigError(
            f"label_smoothing_factor is {args.label_smoothing_factor}, which this trainer does not use. Leave it out."
        )
    if args.log_completions_hub_repo is not None and not args.log_completions:
        raise ExcludedSetting(
            f"log_completions_hub_repo is {args.log_completions_hub_repo} and log_completions is false, so there "
            "is no table to send. Set `log_completions: true`, or leave log_completions_hub_repo out.",
            {"log_completions_hub_repo": ("log_completions",)},
        )


def take_copied_batch(args) -> int | None:
    """Return `generation_batch_size`, and leave it to TRL's config, where `steps_per_generation` is given beside it.

    TRL's config sets both from either and refuses both, so that a copy of its fields makes no config.
    """
    given = args.generation_batch_size
    if args._resolved_upstream or args.steps_per_generation is None:
        return None
    args.generation_batch_size = None
    return given


def check_copied_batch(args, given: int | None) -> None:
    """Refuse a `generation_batch_size` that does not follow from the settings beside it."""
    if given in (None, args.generation_batch_size):
        return
    raise ExcludedSetting(
        f"generation_batch_size is {given} and steps_per_generation is {args.steps_per_generation}, by which it is "
        f"{args.generation_batch_size}; each follows from the other. Leave one of them out, which in a copy of a "
        "config is to set it to None.",
        {
            "generation_batch_size": ("steps_per_generation",),
            "steps_per_generation": ("generation_batch_size",),
        },
    )


def check_sampling(args) -> None:
    """Refuse sampling whose distribution the trainer's log-probabilities do not have, or warn of it."""
    if not args.temperature > 0:
        raise ConfigError(f"temperature is {args.temperature}; it must be above 0, rollouts of a prompt must differ.")
    if "temperature" in (args.generation_kwargs or {}):
        raise ConfigError(
            "generation_kwargs sets temperature, of which the log-probabilities in training would not know. Set "
            "`temperature` instead."
        )
    neutral = {"top_p": (1.0, None), "top_k": (0, None, -1), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
    sampling = args.sampling
    changed = [f"{name} is {sampling[name]}" for name, values in neutral.items() if sampling[name] not in values]
    if not changed:
        return
    found = f"{', '.join(changed)}, so rollouts are drawn from another distribution than the model's own"
    if args.use_vllm and args.vllm_importance_sampling_correction:
        raise ConfigError(
            f"{found}, and the ratio between vLLM's log-probabilities and the trainer's would correct for it token "
            "by token as if it were an error. Leave it at its default, or set "
            "`vllm_importance_sampling_correction: false`."
        )
    get_logger().warning("%s; the gradient does not account for it", found)


def check_quantile(args) -> None:
    """Refuse a quantile that the advantage does not use, or that lies outside (0, 1)."""
    if args.quantile is None:
        # where the preset has a quantile, null was chosen
        if args.advantage == "quantile" and type(args).quantile is None:
            raise ConfigError(
                "advantage is quantile, and quantile is not set. Set `quantile: 0.4`, or `advantage: group_mean`."
            )
        return
    if args.advantage != "quantile":
        args._has_no_effect(
            "quantile",
            None,
            ("advantage", "estimator"),
            f"quantile is {args.quantile}, which has no effect on advantage: {args.advantage}. Set "
            "`advantage: quantile`, or leave quantile out.",
        )
        return
    if isinstance(args.quantile, bool | str) or not 0 < args.quantile < 1:
        raise ConfigError(
            f"quantile is {args.quantile!r}; it must lie in (0, 1), 0.4 is usual; null is the group mean."
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ExcludedSetting(
            f"multi_objective_aggregation is {args.multi_objective_aggregation} with a quantile of the summed "
            "reward. Set `multi_objective_aggregation: sum_then_normalize`, or `quantile: null`.",
            {"multi_objective_aggregation": ("quantile", "advantage", "estimator")},
        )
    place = order_statistic(args.quantile, args.num_generations)
    if place in (1, args.num_generations):
        get_logger().warning(
            "quantile %s of %d rollouts is the %s of them, so no advantage is %s",
            args.quantile,
            args.num_generations,
            *(("least", "below 0") if place == 1 else ("greatest", "above 0")),
        )


def check_gate(args) -> None:
    """Refuse gates for demonstrations that cannot be; a preset's `gamma` gives way to `soft_gate`."""
    if args.gamma is not None and (isinstance(args.gamma, bool | str) or not 0 <= args.gamma <= 1):
        raise ConfigError(f"gamma is {args.gamma!r}; it is a share of rollouts, in [0, 1]; null closes the gate.")
    _check_soft_gate(args)
    if not args.learns_from_demonstrations:
        return
    if args.gamma is not None and args.soft_gate is not None:
        if "gamma" in args._written:
            raise ExcludedSetting(
                "gamma and soft_gate are both set; a prompt has one gate. Leave one of them out.",
                {"gamma": ("soft_gate",), "soft_gate": ("gamma",)},
            )
        # a preset's own
        args.gamma = None
    if args.sft_normalization != "unified" and args.loss_type == "bnpo":
        raise ExcludedSetting(
            f"sft_normalization is {args.sft_normalization} with loss_type bnpo, whose weight of a token depends "
            "on the micro-batch. Set `sft_normalization: unified`, or another loss_type.",
            {"sft_normalization": ("loss_type",), "loss_type": ("sft_normalization",)},
        )
    for name, value, neutral, why in (
        ("top_entropy_quantile", args.top_entropy_quantile, 1.0, "it would mask tokens of demonstrations"),
        ("off_policy_mask_threshold", args.off_policy_mask_threshold, None, "it would mask demonstrations"),
        ("importance_sampling_level", args.importance_sampling_level, "token", "demonstrations weigh tokens"),
    ):
        if value != neutral:
            raise ExcludedSetting(
                f"{name} is {value} with a gate for demonstrations; {why}. Leave {name} out.",
                {name: ("gamma", "soft_gate")},
            )


def _check_soft_gate(args) -> None:
    """Refuse a soft gate of another shape, or beside a demonstration loss that it does not reach."""
    rows = () if args.soft_gate is None else args.soft_gate
    good = isinstance(rows, list | tuple) and all(
        isinstance(row, list | tuple) and len(row) == 3 and all(map(is_weight, row)) for row in rows
    )
    if not good or (args.soft_gate is not None and len(rows) != args.num_generations + 1):
        raise ConfigError(
            f"soft_gate must have {args.num_generations + 1} rows (for 0 to num_generations successes) of "
            "three finite weights of 0 or more: rollouts, off-policy demonstration, SFT demonstration. It is "
            f"{shorten(args.soft_gate)}."
        )
    off_policy = any(row[1] > 0 for row in rows)
    if off_policy and args.demonstration_loss == "sft":
        raise ConfigError(
            "soft_gate has weights of off-policy demonstrations, and demonstration_loss is sft, which says nothing "
            "of them. Set `demonstration_loss: luffy` or `srft`, or use the third weight."
        )
    if not off_policy and args.demonstration_loss != "sft":
        raise ExcludedSetting(
            f"demonstration_loss is {args.demonstration_loss}, which has no effect without off-policy weights in "
            "soft_gate: a demonstration of gamma is an SFT row. Set such weights, or leave demonstration_loss out.",
            {"demonstration_loss": ("soft_gate", "gamma")},
        )


def is_number(value) -> bool:
    """Return whether a setting is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_weight(value) -> bool:
    """Return whether a setting is a finite number of 0 or more."""
    return is_number(value) and value >= 0
