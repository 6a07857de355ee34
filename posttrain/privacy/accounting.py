"""How much privacy steps of DP-SGD spend, and the noise that keeps them within a promise; dp-accounting adds up."""

import functools
import importlib.metadata
import math
from collections.abc import Iterable
from typing import NamedTuple

from posttrain.errors import ConfigError, require

# of privacy losses that dp-accounting tells apart; 1e-4 costs ten times the time for less than 1e-3 of epsilon
INTERVAL = 1e-3
# noise below it makes epsilon so large that its distribution does not fit into memory, and promises nothing
LEAST_NOISE = 0.1
MOST_NOISE = 1e6
_LITTLE_NOISE = 0.4
# relative width within which the noise for an epsilon is found; it is taken from the upper end
_TOLERANCE = 1e-6


class Steps(NamedTuple):
    """Steps of one kind that a mechanism took.

    Attributes:
        noise_multiplier: standard deviation of a step's noise over the clipping norm.
        rate: probability of each unit of privacy to be drawn in a step.
        cap: most units that a step takes of those drawn, chosen at random; None where all are taken.
        units: in the training data.
        steps: how many.
    """

    noise_multiplier: float
    rate: float
    cap: int | None
    units: int
    steps: int

    @property
    def is_capped(self) -> bool:
        """Whether a draw may have more units than the cap."""
        return self.cap is not None and self.cap < self.units


def epsilon(history: Iterable[Steps], delta: float, accountant: str = "pld", neighbours: str = "add_remove") -> float:
    """Return the epsilon at `delta` of all steps of a history together; infinity where one of them had no noise.

    The figure is an upper bound: of privacy loss distributions by rounding up on a grid of 1e-3, of Renyi divergences
    (`accountant` rdp) by the conversion to epsilon.

    Args:
        history: the steps, in any order. delta: of the promise.
        accountant: pld or rdp. neighbours: add_remove or replace_one.

    Raises:
        ConfigError: rdp with capped draws or neighbours replace_one, of which it has no bound.
        EnvironmentIssue: dp-accounting is missing.

    Source: arXiv 2106.08567 (grids of privacy losses), 2508.15089 (capped draws), 1908.10530 (rdp).
    """
    kinds = tuple((entry._replace(steps=1), entry.steps) for entry in kinds_of(history))
    return _epsilon(kinds, delta, accountant, neighbours)


def kinds_of(history: Iterable[Steps]) -> tuple[Steps, ...]:
    """Return a history with the steps of each kind as one entry: of histories that spend alike, the same one."""
    kinds: dict[Steps, int] = {}
    for entry in history:
        if entry.steps:
            kind = entry._replace(steps=1, cap=entry.cap if entry.is_capped else None)
            kinds[kind] = kinds.get(kind, 0) + entry.steps
    return tuple(kind._replace(steps=steps) for kind, steps in sorted(kinds.items(), key=repr))


def version() -> str | None:
    """Return the version of dp-accounting that adds up here; None where it is missing."""
    try:
        return importlib.metadata.version("dp-accounting")
    except importlib.metadata.PackageNotFoundError:
        return None


def solve_noise(
    target_epsilon: float,
    delta: float,
    *,
    rate: float,
    cap: int | None,
    units: int,
    steps: int,
    accountant: str = "pld",
    neighbours: str = "add_remove",
) -> float:
    """Return the least noise multiplier with which steps spend no more than `target_epsilon` at `delta`.

    It is above the exact one by a millionth of it at most, and 0 for an epsilon of infinity. The other arguments are
    those of `Steps` and `epsilon`.

    Raises:
        ConfigError: no noise within reason keeps the promise, or noise below 0.1 would; what `epsilon` refuses.
        EnvironmentIssue: dp-accounting is missing.
    """
    if math.isinf(target_epsilon):
        return 0.0
    kind = Steps(1.0, rate, cap, units, steps)
    return _solved(target_epsilon, delta, kind._replace(cap=cap if kind.is_capped else None), accountant, neighbours)


# of a federated run each client may have a number of units of its own
@functools.lru_cache(maxsize=1024)
def _solved(target: float, delta: float, kind: Steps, accountant: str, neighbours: str) -> float:
    def excess(log_noise: float, kind: Steps, interval: float) -> float:
        kinds = ((kind._replace(noise_multiplier=math.exp(log_noise), steps=1), kind.steps),)
        return math.log(max(_epsilon(kinds, delta, accountant, neighbours, interval), 1e-12) / target)

    # near it first, on a coarse grid and without the cap, which takes a twentieth of the time
    rough = functools.partial(excess, kind=kind._replace(cap=None), interval=10 * INTERVAL)
    low = high = 0.0
    while rough(high) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(MOST_NOISE):
            raise ConfigError(
                f"target_epsilon is {target:g} at target_delta {delta:g} over {kind.steps} steps that draw each unit "
                f"with probability {kind.rate:.3g}: it would take noise of more than {MOST_NOISE:g} times clip_norm. "
                "Give a larger epsilon, fewer steps, or a smaller expected_batch_size."
            )
    while low == high or rough(low) <= 0:
        if low <= math.log(LEAST_NOISE):
            raise ConfigError(
                f"target_epsilon is {target:g}, which {kind.steps} steps would keep with noise of less than "
                f"{LEAST_NOISE} times clip_norm: such a promise is worth nothing. Give a smaller epsilon, or "
                "`target_epsilon: inf`, which says that the run is not private."
            )
        low, high = max(low - math.log(2), math.log(LEAST_NOISE)), low
    from scipy.optimize import brentq

    exact = functools.partial(excess, kind=kind, interval=INTERVAL)
    start, width = brentq(rough, low, high, xtol=1e-4), 5e-4
    low, high = start - width, start + width
    while exact(high) > 0:
        low, high, width = high, high + 4 * width, 4 * width
    while exact(low) <= 0:
        low, high, width = low - 4 * width, low, 4 * width
    found = brentq(exact, low, high, xtol=_TOLERANCE / 4, rtol=1e-15) + _TOLERANCE / 2
    while exact(found) > 0:
        found += _TOLERANCE / 2
    return math.exp(found)


@functools.lru_cache(maxsize=4096)
def _epsilon(
    kinds: tuple[tuple[Steps, int], ...], delta: float, accountant: str, neighbours: str, interval: float = INTERVAL
) -> float:
    if not kinds:
        return 0.0
    if any(kind.noise_multiplier == 0 for kind, _ in kinds):
        return math.inf
    require("dp_accounting", "dp", "accounting for the privacy that a run spends")
    if accountant == "rdp":
        return _by_divergences(kinds, delta, neighbours)
    return _by_losses(kinds, delta, neighbours, interval)


def _by_losses(kinds, delta: float, neighbours: str, interval: float) -> float:
    if min(kind.noise_multiplier for kind, _ in kinds) < _LITTLE_NOISE:
        # losses so large that a fine grid of them would not fit into memory; rounding up stays an upper bound
        uncapped = tuple((kind._replace(cap=None), steps) for kind, steps in kinds)
        interval = max(interval, _by_divergences(uncapped, delta, "add_remove") * 1e-4)
    whole = None
    for kind, steps in kinds:
        part = _losses(kind, neighbours, interval).self_compose(steps)
        whole = part if whole is None else whole.compose(part)
    return float(whole.get_epsilon_for_delta(delta))


@functools.lru_cache(maxsize=64)
def _losses(kind: Steps, neighbours: str, interval: float):
    """Return the privacy loss distribution of one step, as dp-accounting has it."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as losses

    relation = dict(add_remove=NeighboringRelation.ADD_OR_REMOVE_ONE, replace_one=NeighboringRelation.REPLACE_ONE)[
        neighbours
    ]
    common = dict(value_discretization_interval=interval, neighboring_relation=relation)
    if not kind.is_capped:
        return losses.from_gaussian_mechanism(kind.noise_multiplier, sampling_prob=kind.rate, **common)
    return losses.from_truncated_subsampled_gaussian_mechanism(
        dataset_size=kind.units,
        sampling_probability=kind.rate,
        truncated_batch_size=kind.cap,
        noise_multiplier=kind.noise_multiplier,
        **common,
    )


def _by_divergences(kinds, delta: float, neighbours: str) -> float:
    import dp_accounting
    from absl import logging

    if neighbours != "add_remove":
        raise ConfigError(
            f"accountant is rdp and neighbours is {neighbours}, which it has no bound for. Set `accountant: pld`, or "
            "leave neighbours out."
        )
    account = dp_accounting.rdp.RdpAccountant()
    for kind, steps in kinds:
        if kind.is_capped:
            raise ConfigError(
                f"accountant is rdp, and a step takes at most {kind.cap} of {kind.units} units, which it has no bound "
                "for. Set `accountant: pld`."
            )
        event = dp_accounting.GaussianDpEvent(kind.noise_multiplier)
        # orders that are found to have no bound are left out, which it tells of each; the bound is one without them
        before = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)
        try:
            account.compose(dp_accounting.PoissonSampledDpEvent(kind.rate, event), steps)
        finally:
            logging.set_verbosity(before)
    return float(account.get_epsilon(delta))
