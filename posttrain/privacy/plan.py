"""What the steps of a private run are, before it begins: how likely a unit is, how many there are, how much noise."""

import math
from dataclasses import dataclass

from posttrain.errors import ConfigError
from posttrain.privacy.accounting import Steps, epsilon, solve_noise
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.sampling import cap_of, micro_batches

# steps that are accounted for within a minute, and whose privacy losses fit into memory
MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Plan:
    """Holds what follows from the settings of a private run and the number of its units.

    Attributes:
        units: of privacy, in the training data. rate: probability of each in a step. cap: most of them in a step.
        micro_batches: of a step on each rank; later ones are empty in most steps.
        steps_an_epoch: steps that draw each unit once on average, rounded up. steps: of the run.
        noise_multiplier: standard deviation of a step's noise over the clipping norm; 0 without a promise.
        epsilon: that all steps spend, of all turns of a client; None without a promise.
    """

    units: int
    rate: float
    cap: int
    micro_batches: int
    steps_an_epoch: int
    steps: int
    noise_multiplier: float
    epsilon: float | None

    @property
    def kind(self) -> Steps:
        """Return what a step is, for the accounting."""
        return Steps(self.noise_multiplier, self.rate, self.cap, self.units, 0)

    def told(self) -> dict[str, object]:
        """Return the plan by names, for a dry run."""
        facts: dict[str, object] = {"units of privacy": self.units, "most units of a step": self.cap}
        if self.epsilon is None:
            return facts | {"epsilon": "none is promised: there is no noise"}
        return facts | {"noise_multiplier": round(self.noise_multiplier, 6), "epsilon": round(self.epsilon, 6)}


def plan(
    privacy: PrivacyConfig,
    units: int,
    *,
    rows: int,
    ranks: int,
    accumulation: int | None,
    max_steps: int,
    epochs: float,
    turns: int = 1,
) -> Plan:
    """Return the steps of a private run.

    Args:
        privacy: its settings. units: of privacy, in the training data.
        rows: of a micro-batch, at most. ranks: how many processes share a step.
        accumulation: micro-batches of a step on each rank; None for as few as hold any draw.
        max_steps: of the run; 0 or less to go by `epochs`, which draw each unit so many times on average.
        turns: that a client of a federated run may take, each of so many steps; the promise is of all together.

    Raises:
        ConfigError: too few micro-batches for the largest draw; more steps than are accounted for; what
            `PrivacyConfig.check_units` and the accounting refuse.
        EnvironmentIssue: dp-accounting is missing.
    """
    privacy.check_units(units)
    expected = privacy.expected_batch_size
    cap = cap_of(expected, units)
    needed = micro_batches(cap, privacy.rows_per_unit, rows, ranks)
    if accumulation is not None and accumulation < needed:
        raise ConfigError(
            f"gradient_accumulation_steps is {accumulation}, and a step of expected_batch_size {expected} may draw "
            f"{cap} units, which need {needed} micro-batches of {rows} rows on each of {ranks} processes. Set it to "
            f"{needed} or more, leave it out, or give a larger per_device_train_batch_size."
        )
    rate, an_epoch = expected / units, math.ceil(units / expected)
    steps = max_steps if max_steps > 0 else max(1, math.ceil(an_epoch * epochs))
    if privacy.is_private and steps * turns > MOST_STEPS:
        raise ConfigError(
            f"max_steps, or num_train_epochs, comes to {steps * turns} steps, and privacy is accounted for over "
            f"{MOST_STEPS} at most. Take fewer, with a larger expected_batch_size."
        )
    noise = privacy.noise_multiplier
    promise = dict(accountant=privacy.accountant, neighbours=privacy.neighbours)
    kind = dict(rate=rate, cap=cap, units=units, steps=steps * turns)
    if noise is None:
        noise = solve_noise(privacy.target_epsilon, privacy.target_delta, **kind, **promise)
    spent = epsilon([Steps(noise, **kind)], privacy.target_delta, **promise) if privacy.is_private else None
    return Plan(units, rate, cap, accumulation or needed, an_epoch, steps, noise, spent)
