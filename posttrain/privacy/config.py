"""Settings of a private run: what is promised to whom, and how a step keeps the promise."""

import math
from dataclasses import dataclass
from typing import ClassVar

from posttrain.checks import check_choice, check_holdable, plain
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.log import get_logger
from posttrain.privacy.accounting import LEAST_NOISE, MOST_NOISE

# above it an epsilon promises little
_HIGH_EPSILON = 10.0
_CLIPPINGS = ("flat", "automatic")
_ACCOUNTANTS = ("pld", "rdp")
_NEIGHBOURS = ("add_remove", "replace_one")
_MOST_CANARIES = 100_000
# beyond them noise and clipped gradients leave what fp32 can hold
_LEAST_CLIP, _MOST_CLIP = 1e-6, 1e6
# below it epsilon comes from the mass that is cut off the tails of privacy losses
_LEAST_DELTA = 1e-12


@dataclass
class PrivacyConfig:
    """Settings of differentially private training (DP-SGD), parsed beside those of a trainer.

    A run with them promises (target_epsilon, target_delta) to each unit of privacy: a row, or all rows that share a
    value of `privacy_unit_column`. One of target_epsilon and noise_multiplier is needed; neither has a default.

    Raises:
        ConfigError: (a ValueError) a value out of range, or settings that exclude each other.

    Source: arXiv 1607.00133, algorithm 1.
    """

    target_epsilon: float | None = setting(
        None,
        "Epsilon that the run may spend; its noise is solved from it. inf trains without noise and promises nothing. "
        "Give it or noise_multiplier.",
        identity=True,
        card=True,
        infinite=True,
    )
    target_delta: float = setting(
        1e-5,
        "Delta of the promise, above 0 and below 1 over the number of units of privacy.",
        identity=True,
        card=lambda privacy: privacy.is_private,
    )
    noise_multiplier: float | None = setting(
        None,
        "Standard deviation of a step's noise over clip_norm, 0.1 or more; the epsilon that it comes to is reported. "
        "Give it or target_epsilon.",
        identity=True,
        card=True,
    )
    clip_norm: float = setting(
        1.0,
        "Largest norm that the gradient of a unit of privacy has in a step, over all trained tensors. inf clips "
        "nothing, for target_epsilon: inf alone.",
        identity=True,
        card=lambda privacy: True,
        infinite=True,
    )
    clipping: str = setting(
        "flat",
        "flat: gradients longer than clip_norm are cut to it; automatic: each is divided by its norm + 0.01 and "
        "multiplied by clip_norm, so that clip_norm needs no tuning.",
        identity=True,
        card=lambda privacy: True,
    )
    accountant: str = setting(
        "pld",
        "How steps are added up: pld, privacy loss distributions; or rdp, Renyi divergences, a looser bound that "
        "knows neither draws with a cap nor neighbours: replace_one.",
        identity=True,
        card=lambda privacy: privacy.is_private,
    )
    expected_batch_size: int | None = setting(
        None,
        "Units of privacy that a step draws on average, each independently of the others; needed. 256 and more is "
        "usual: the noise of a step is the same for any number.",
        identity=True,
        card=True,
    )
    privacy_unit_column: str | None = setting(
        None,
        "Column whose value says to whom a row belongs, such as a user's id: the promise is to all rows with the value "
        "together. Default: each row is a unit by itself.",
        identity=True,
        card=True,
    )
    rows_per_unit: int = setting(
        1,
        "Most rows of a unit that a step it is drawn for takes, chosen anew each time; privacy_unit_column only.",
        identity=True,
        card=lambda privacy: privacy.privacy_unit_column is not None,
    )
    neighbours: str = setting(
        "add_remove",
        "Data sets that are told apart no better than the promise says: add_remove, with a unit and without it; "
        "replace_one, with a unit and with another in its place, which costs more epsilon for the same noise.",
        identity=True,
        card=lambda privacy: privacy.is_private,
    )
    publish_private_metrics: bool = setting(
        False,
        "Put losses, norms, evaluations and curves of private rows into card and push; they are computed without "
        "noise, and the promise does not cover them.",
        identity=False,
        card=True,
    )
    audit_canaries: int = setting(
        0,
        "Made-up units whose gradients are known, half of them taken part at random; how well the noisy gradients tell "
        "which gives a lower bound on the epsilon of the run, for the card. 0: no audit.",
        identity=True,
        card=True,
    )

    # what null of a setting means, for the card
    nulls: ClassVar[dict[str, str]] = {"target_epsilon": "noise_multiplier is given"}

    def __post_init__(self):
        epsilon, sigma = self._number("target_epsilon"), self._number("noise_multiplier")
        if epsilon is None and sigma is None:
            raise ConfigError(
                "target_epsilon and noise_multiplier are both null; a private run needs one of them: target_epsilon, "
                "such as 8, 3 or 1, less being the stronger promise, or noise_multiplier, such as 1."
            )
        if epsilon is not None and sigma is not None:
            raise ExcludedSetting(
                f"target_epsilon is {epsilon:g} and noise_multiplier is {sigma:g}, which follow from each other. Leave "
                "one of them out.",
                {"target_epsilon": ("noise_multiplier",), "noise_multiplier": ("target_epsilon",)},
            )
        if epsilon is not None and not epsilon > 0:
            raise ConfigError(f"target_epsilon is {epsilon!r}; it must be a number above 0, such as 3, or inf.")
        if sigma is not None and not LEAST_NOISE <= sigma <= MOST_NOISE:
            raise ConfigError(
                f"noise_multiplier is {sigma!r}; it must be a number from {LEAST_NOISE} to {MOST_NOISE:g}: with less, "
                "the promise is worth nothing. A run without noise says so by `target_epsilon: inf`."
            )
        delta = self._number("target_delta")
        if delta is None or not 0 < delta < 1:
            raise ConfigError(f"target_delta is {delta!r}; it must be a number above 0 and below 1, such as 1e-5.")
        if delta < _LEAST_DELTA:
            raise ConfigError(
                f"target_delta is {delta!r}; below {_LEAST_DELTA:g} rounded privacy losses decide about epsilon. "
                "Give a larger one: a hundredth of 1 over the number of units is usual."
            )
        clip = self._number("clip_norm")
        if clip is None or not (_LEAST_CLIP <= clip <= _MOST_CLIP or clip == math.inf):
            raise ConfigError(
                f"clip_norm is {clip!r}; it must be a number from {_LEAST_CLIP:g} to {_MOST_CLIP:g}, such as 1, or inf."
            )
        check_choice("clipping", self.clipping, _CLIPPINGS)
        check_choice("accountant", self.accountant, _ACCOUNTANTS)
        check_choice("neighbours", self.neighbours, _NEIGHBOURS)
        if math.isinf(clip) and (self.is_private or self.clipping == "automatic"):
            raise ConfigError(
                "clip_norm is inf, so that one unit may move a step by any amount and no noise covers it. Give a "
                "finite clip_norm; inf is for `target_epsilon: inf` with `clipping: flat`, which promises nothing."
            )
        if self.accountant == "rdp" and self.neighbours == "replace_one":
            raise ExcludedSetting(
                "accountant is rdp and neighbours is replace_one, which it has no bound for. Set `accountant: pld`, or "
                "leave neighbours out.",
                {"accountant": ("neighbours",), "neighbours": ("accountant",)},
            )
        self._check_units()
        for name in ("publish_private_metrics",):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be true or false.")
        self._whole("audit_canaries", 0, _MOST_CANARIES)
        if 0 < self.audit_canaries < 100:
            raise ConfigError(
                f"audit_canaries is {self.audit_canaries}, of which too few are right or wrong for a bound. Give 100 "
                "or more, such as 2000, or 0 for no audit."
            )
        if self.audit_canaries and not self.is_private:
            raise ExcludedSetting(
                f"audit_canaries is {self.audit_canaries} and target_epsilon is inf: there is no promise to audit. "
                "Leave one of them out.",
                {"audit_canaries": ("target_epsilon",), "target_epsilon": ("audit_canaries",)},
            )
        if epsilon is not None and _HIGH_EPSILON < epsilon < math.inf:
            get_logger().warning(
                "target_epsilon is %g: above %g the promise is weak, as whether someone's rows were trained on may "
                "change the odds of what is seen by a factor of e^%g",
                epsilon, _HIGH_EPSILON, epsilon,
            )  # fmt: skip

    def _check_units(self) -> None:
        if self.expected_batch_size is None:
            raise ConfigError(
                "expected_batch_size is null; a private run needs the number of units that a step draws on average, "
                "such as 256."
            )
        self._whole("expected_batch_size", 1)
        self._whole("rows_per_unit", 1)
        column = self.privacy_unit_column
        if column is not None and not (isinstance(column, str) and column.strip()):
            raise ConfigError(
                f"privacy_unit_column is {column!r}; it must be the name of a column, or be left out: each row is a "
                "unit then."
            )
        if self.rows_per_unit > 1 and column is None:
            raise ExcludedSetting(
                f"rows_per_unit is {self.rows_per_unit}, and without privacy_unit_column each row is a unit by itself. "
                "Set privacy_unit_column, or leave rows_per_unit out.",
                {"rows_per_unit": ("privacy_unit_column",)},
            )

    def _number(self, name: str) -> float | None:
        """Return a setting as a number of Python's own, after putting it into place; None for null."""
        value = plain(getattr(self, name))
        check_holdable(name, value)
        if isinstance(value, str) and value.strip().lower() in ("inf", "infinity", ".inf"):
            value = math.inf
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value)):
            raise ConfigError(f"{name} is {value!r}; it takes a number.")
        setattr(self, name, value)
        return value

    def _whole(self, name: str, low: int, high: int | None = None) -> None:
        value = plain(getattr(self, name))
        check_holdable(name, value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            span = f"of {low} or more" if high is None else f"from {low} to {high}"
            raise ConfigError(f"{name} is {value!r}; it must be a whole number {span}.")
        setattr(self, name, value)

    @property
    def is_private(self) -> bool:
        """Whether the run promises anything: false for `target_epsilon: inf`, which trains without noise."""
        return self.target_epsilon is None or math.isfinite(self.target_epsilon)

    def check_units(self, units: int) -> None:
        """Refuse settings that a number of units of privacy cannot have.

        Args:
            units: rows, or values of `privacy_unit_column`, in the training data.

        Raises:
            ConfigError: fewer units than a step draws on average, or a delta of 1 over their number or more: a run
                could give one unit away whole and keep such a promise.
        """
        what = "rows" if self.privacy_unit_column is None else f"values of {self.privacy_unit_column}"
        if self.expected_batch_size > units:
            raise ConfigError(
                f"expected_batch_size is {self.expected_batch_size}, and the training data has {units} units of "
                f"privacy ({what}). Give {units} or fewer, which draws all of them in each step."
            )
        if self.is_private and self.target_delta >= 1 / units:
            raise ConfigError(
                f"target_delta is {self.target_delta:g}, and the training data has {units} units of privacy ({what}): "
                "a run that gives one of them away whole could keep such a promise. Give less than 1 over their "
                f"number, {1 / units:.2g}, such as {_round_down(0.1 / units)}."
            )


def _round_down(value: float) -> str:
    """Write a number as one digit and a power of ten, rounded down."""
    digit, exponent = f"{value:e}".split("e")
    return f"{int(float(digit))}e{int(exponent)}"
