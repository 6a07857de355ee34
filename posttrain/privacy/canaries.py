"""Canaries of a private run: made-up units that take part in its steps, for an audit of what the steps give away."""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.privacy.audit import Audit, audit
from posttrain.privacy.sampling import drawn, random_numbers

# norm of a canary's gradient before it is clipped, in clipping norms: clipping that is left out shows
LOUDNESS = 10.0
# trained values for each canary, so that they move few of them
_VALUES_EACH = 10


class GradientCanaries:
    """Units whose gradient is along one trained value each, half of them taken part by a coin of their own.

    One that takes part is drawn in each step like any unit, with the same probability; its gradient is ten times
    as long as the clipping norm, is clipped as others are, and is added to the sum before the noise. Nobody's row is in
    it, so canaries cost no privacy; they move the trained values that they lie on by at most the clipping norm in each
    step that draws them. A canary's score is the log of how much more likely its noisy values are if it took part.

    Args:
        count: how many. values: trained values there are.
        noise_multiplier, rate, clip_norm: of the run.
        coefficient: gives for norms (N,) what gradients are multiplied by to be clipped, as the run clips.
        secret: where the canaries lie and who takes part; default: from the operating system's entropy.

    Raises:
        ConfigError: fewer than ten trained values for each canary.
    """

    def __init__(
        self,
        count: int,
        values: int,
        *,
        noise_multiplier: float,
        rate: float,
        clip_norm: float,
        coefficient: Callable[[Tensor], Tensor],
        secret: bytes | None = None,
    ):
        if count * _VALUES_EACH > values:
            raise ConfigError(
                f"audit_canaries is {count}, and {values} values are trained, of which each canary moves one. Give "
                f"{values // _VALUES_EACH} or fewer."
            )
        self.count, self.values = count, values
        self.noise, self.rate, self.clip_norm = noise_multiplier, rate, clip_norm
        loud = LOUDNESS * clip_norm
        # of a canary's gradient after clipping, in clipping norms
        self.length = LOUDNESS * float(coefficient(torch.tensor([loud], dtype=torch.float64))[0])
        self._begin(secret or os.urandom(32))
        self.scores, self.steps = np.zeros(count), 0

    def _begin(self, secret: bytes) -> None:
        self._secret = secret
        places, more = np.empty(0, dtype=np.int64), 0
        while len(places) < self.count:
            more_places = random_numbers(secret, f"places {more}", 2 * self.count) % np.uint64(self.values)
            tried = np.concatenate([places, more_places.astype(np.int64)])
            # the first of each, in the order drawn
            _, first = np.unique(tried, return_index=True)
            places = tried[np.sort(first)][: self.count]
            more += 1
        self.places = torch.from_numpy(places)
        self.included = random_numbers(secret, "coins", self.count) % np.uint64(2) == 1

    def add_to(self, total: Tensor) -> None:
        """Add the clipped gradients of the canaries that a step draws to the sum of units' gradients.

        Args:
            total: (values,), all trained values behind each other, before the noise; of one rank alone.
        """
        moved = self.places[torch.from_numpy(self._drawn() & self.included)].to(total.device)
        total[moved] += self.length * self.clip_norm

    def _drawn(self) -> np.ndarray:
        """Return which canaries the step to come draws, of those that take part."""
        return drawn(random_numbers(self._secret, f"step {self.steps}", self.count), self.rate)

    def _known_rates(self) -> float | np.ndarray:
        """Return how likely the step to come draws each canary, for one who knows all but the drawn secret."""
        return self.rate

    def observe(self, noisy: Tensor) -> None:
        """Score the canaries by a step's sum with its noise, (values,), undivided: what whoever sees a step has."""
        seen = noisy[self.places.to(noisy.device)].double().cpu().numpy() / self.clip_norm
        shift = (seen * self.length - self.length**2 / 2) / self.noise**2
        rates = self._known_rates()
        # of a rate of 0 or 1 one of the two is -inf
        with np.errstate(divide="ignore"):
            self.scores += np.logaddexp(np.log1p(-rates), np.log(rates) + shift)
        self.steps += 1

    def result(self, delta: float, confidence: float = 0.95) -> Audit:
        """Return the lower bound on epsilon that the scores of all steps so far give."""
        return audit(self.scores, self.included, delta, confidence)

    def state(self) -> dict:
        """Return what a run needs to go on with these canaries, as plain JSON; it tells nothing of anyone's rows."""
        # a checkpoint drops what is named as a password is
        return {"drawn_by": self._secret.hex(), "scores": [float(score) for score in self.scores], "steps": self.steps}

    def load(self, state: dict) -> None:
        """Take over what `state` returned. Raises ConfigError where it is of another number of canaries."""
        try:
            secret, scores, steps = (
                bytes.fromhex(state["drawn_by"]),
                np.array(state["scores"], dtype=float),
                state["steps"],
            )
            if scores.shape != (self.count,) or type(steps) is not int or steps < 0:
                raise ValueError(steps)
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"the checkpoint has no scores of {self.count} canaries. Resume with the audit_canaries that its run "
                "had, or start a new run."
            ) from None
        self._begin(secret)
        self.scores, self.steps = scores, steps
