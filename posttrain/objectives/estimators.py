"""The parts that make up a policy-gradient method, the methods as choices of them, and the table of both.

What each part computes stands in `policy_gradient`; here are names and numbers only.
"""

from dataclasses import dataclass, replace

REFERENCES = ("policy", "old", "frozen", "one")
LEVELS = ("token", "sequence", "product")
STABILITIES = ("none", "clip", "clamp")
SHAPINGS = ("none", "luffy")
SCALES = ("none", "group", "batch")
AGGREGATES = ("token_mean", "row_mean", "row_sum", "dr_grpo")
# Names of advantages and how the table writes them; R is a reward, V a value, c the weight of demonstrations.
ADVANTAGES = {
    "one": "1",
    "sign": "+1 or -1",
    "reward": "R",
    "group_mean": "R - mean of the rollouts",
    "mixed_group_mean": "R - mean of rollouts and demonstration",
    "quantile": "R - K-quantile of the rollouts",
    "leave_one_out": "R - mean of the other rollouts",
    "demonstration": "c (1)",
    "positive": "max(R - V, 0)",
    "positive_minus_beta": "max(R - V, 0) - beta",
}


@dataclass(frozen=True)
class Estimator:
    """The parts of a method. A wrong name, or a bound that no part would use, raises ValueError.

    reference: whose probability divides the gradient. "policy": the policy itself, so the ratio is 1; "old": the policy
        that sampled the answers; "frozen": a fixed reference model; "one": nothing, the ratio is pi_theta.
    level: the ratio of a "token"; of a "sequence", the geometric mean of its tokens' (TRL's word, GSPO); or their
        "product", the ratio of the whole answer (A-LoL).
    stability: "none"; "clip": PPO's, no gradient where the ratio has left [ratio_min, ratio_max] in the direction
        that the advantage pushes; "clamp": the ratio itself is held inside, and the gradient never vanishes.
    ratio_min, ratio_max: bounds of the ratio itself: TRL's `1 - epsilon` and `1 + epsilon_high`, for CISPO its plain
        `epsilon_high`. Both for "clip", None for a side left open by "clamp".
    delta: with "clip", no gradient above this ratio for negative advantages either (TRL's `delta`); None: no bound.
    shaping: f, the likelihood whose gradient is taken. "none": f(p) = p; "luffy": f(p) = p / (p + shaping_gamma).
    advantage, scale: a name of `ADVANTAGES`, and TRL's `scale_rewards` for those that compare rewards. Names only: the
        functions of tensors take the numbers.
    aggregate: "token_mean" over all tokens, "row_mean" over rows of their token means, "row_sum" over rows of their
        sums, "dr_grpo": the sum over rows x max_length.
    """

    reference: str = "old"
    stability: str = "none"
    advantage: str = "group_mean"
    scale: str = "none"
    shaping: str = "none"
    level: str = "token"
    aggregate: str = "token_mean"
    ratio_min: float | None = None
    ratio_max: float | None = None
    delta: float | None = None
    shaping_gamma: float = 0.1

    def __post_init__(self):
        for field, allowed in (
            ("reference", REFERENCES),
            ("stability", STABILITIES),
            ("advantage", ADVANTAGES),
            ("scale", SCALES),
            ("shaping", SHAPINGS),
            ("level", LEVELS),
            ("aggregate", AGGREGATES),
        ):
            _check_name(field, getattr(self, field), allowed)
        bounds = {"ratio_min": self.ratio_min, "ratio_max": self.ratio_max, "delta": self.delta}
        given = {name: bound for name, bound in bounds.items() if bound is not None}
        if self.stability == "none" and given:
            raise ValueError(f"{_listed(given)} with stability 'none'; bounds need stability 'clip' or 'clamp'.")
        if self.stability == "clip":
            if not ("ratio_min" in given and "ratio_max" in given and self.ratio_min <= 1 <= self.ratio_max):
                raise ValueError(
                    f"{_listed(bounds)}; stability 'clip' needs ratio_min <= 1 <= ratio_max (0.8 and 1.2 is usual)."
                )
            if self.delta is not None and not self.delta > self.ratio_max:
                raise ValueError(f"{_listed(bounds)}; delta must be above ratio_max, or None.")
        if self.stability == "clamp":
            low, high = given.get("ratio_min", 0.0), given.get("ratio_max", float("inf"))
            if self.delta is not None or given == {} or not 0 <= low < high:
                raise ValueError(
                    f"{_listed(bounds)}; stability 'clamp' needs ratio_min, ratio_max or both, 0 <= ratio_min < "
                    "ratio_max, and no delta."
                )
        if self.scale != "none" and self.advantage not in ("group_mean", "mixed_group_mean", "quantile"):
            raise ValueError(
                f"scale is {self.scale!r} with advantage {self.advantage!r}; only group_mean, mixed_group_mean and "
                "quantile are scaled, the others need scale 'none'."
            )
        if not self.shaping_gamma > 0:
            raise ValueError(f"shaping_gamma is {self.shaping_gamma:g}; it must be above 0 (0.1 in LUFFY).")


def _check_name(field, value, allowed):
    if value not in allowed:
        raise ValueError(f"{field} is {value!r}; allowed are {', '.join(allowed)}.")


def _listed(bounds):
    return ", ".join(f"{name} is {bound}" for name, bound in bounds.items())


_GRPO = Estimator(stability="clip", scale="group", aggregate="row_mean", ratio_min=0.8, ratio_max=1.2)
_DAPO = replace(_GRPO, ratio_max=1.28, aggregate="token_mean")
_SFT = Estimator(reference="policy", advantage="one")
_OFFLINE = Estimator(reference="one", advantage="mixed_group_mean", scale="group")
_A_LOL_FREE = Estimator(reference="policy", advantage="positive", aggregate="row_sum")
_A_LOL = replace(_A_LOL_FREE, reference="frozen", level="product", stability="clamp", ratio_min=0.1, ratio_max=1.9)

PRESETS: dict[str, Estimator] = {
    "sft": _SFT,
    "reinforce": replace(_SFT, advantage="sign", aggregate="row_sum"),
    "grpo": _GRPO,
    "dapo": _DAPO,
    "dr_grpo": replace(_GRPO, scale="none", aggregate="dr_grpo"),
    "gspo": replace(_GRPO, level="sequence", ratio_min=0.9997, ratio_max=1.0004),
    "cispo": replace(_GRPO, stability="clamp", ratio_min=None, ratio_max=5.0, aggregate="token_mean"),
    "qae": replace(_DAPO, advantage="quantile"),
    "srft_offline": _OFFLINE,
    "luffy_offline": replace(_OFFLINE, shaping="luffy"),
    "hpt_rollouts": Estimator(aggregate="dr_grpo"),
    "hpt_demonstrations": replace(_SFT, advantage="demonstration", aggregate="dr_grpo"),
    "wbc": replace(_A_LOL_FREE, advantage="reward"),
    "r_gold": Estimator(reference="one", stability="clamp", advantage="reward", aggregate="row_sum", ratio_min=0.1),
    "r_lol": replace(_A_LOL, advantage="reward"),
    "a_lol": _A_LOL,
    "a_lol_seq": replace(_A_LOL, level="token"),
    "a_lol_ref_free": _A_LOL_FREE,
    "a_lol_kl": replace(_A_LOL_FREE, advantage="positive_minus_beta"),
}

_PAPER, _CODE, _INFERRED = "paper", "code", "INFERRED"
# Where each row of the table was read; the legend is the documentation's.
SOURCES: dict[str, str] = {
    "sft": _PAPER,
    "reinforce": _PAPER,
    "grpo": _PAPER,
    "dapo": f"{_INFERRED}; its group filter is the sampler's",
    "dr_grpo": f"{_INFERRED}; HPT's runs drop the clip",
    "gspo": _PAPER,
    "cispo": _PAPER,
    "qae": f"README of the published code; the rest as dapo, {_INFERRED}",
    "srft_offline": _PAPER,
    "luffy_offline": f"{_PAPER}; f from the code",
    "hpt_rollouts": _CODE,
    "hpt_demonstrations": _CODE,
    "wbc": _CODE,
    "r_gold": _CODE,
    "r_lol": _CODE,
    "a_lol": _CODE,
    "a_lol_seq": f"{_CODE}; per token despite its name",
    "a_lol_ref_free": f"{_CODE}, which keeps negative advantages",
    "a_lol_kl": f"{_CODE}; the reference adds a constant only",
}


def parts_table() -> str:
    """Return the methods of `PRESETS` by their parts, as a markdown table. The documentation holds a copy of it."""
    columns = ("method", "pi_ref", "advantage", "stability mask", "likelihood", "mean over", "source")
    lines = [columns, ("---",) * len(columns)]
    lines += [(f"`{name}`", *_cells(parts), SOURCES[name]) for name, parts in PRESETS.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(parts: Estimator) -> tuple[str, ...]:
    reference = {
        ("policy", "token"): "pi_theta",
        ("one", "token"): "1",
        ("old", "token"): "pi_old",
        ("old", "sequence"): "pi_theta (pi_old / pi_theta)^(1/len), of the sequence",
        ("frozen", "token"): "frozen model, each token",
        ("frozen", "product"): "frozen model, whole answer",
    }[parts.reference, parts.level]
    advantage = ADVANTAGES[parts.advantage]
    if parts.scale != "none":
        advantage = f"({advantage}) / std of the {parts.scale}"
    low, high = parts.ratio_min, parts.ratio_max
    stability = "none"
    if parts.stability == "clip":
        stability = f"{'sequence' if parts.level == 'sequence' else 'ratio'} clip, [{low}, {high}]"
    if parts.stability == "clamp":
        span = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
        stability = f"{'pi_theta' if parts.reference == 'one' else 'ratio'} held {span}, detached"
    shaping = {"none": "p", "luffy": f"p / (p + {parts.shaping_gamma:g})"}[parts.shaping]
    average = {
        "token_mean": "tokens",
        "row_mean": "rows of token means",
        "row_sum": "rows of token sums",
        "dr_grpo": "rows x L_max",
    }[parts.aggregate]
    return reference, advantage, stability, shaping, average
