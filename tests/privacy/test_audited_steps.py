"""The private step under audit: a right one stays below its promise, and each planted fault is found.

Noise, coins and draws are the operating system's, as in a run. How likely a right step fails, or a fault is missed, is
computed beside; one case has fixed entropy instead, which is said there.
"""

import os

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from posttrain.mechanisms.row_gradients import RowGradients
from posttrain.privacy import clipping, step
from posttrain.privacy.accounting import Steps, epsilon
from posttrain.privacy.audit import audit
from posttrain.privacy.canaries import GradientCanaries
from posttrain.privacy.noise import gaussian
from posttrain.privacy.step import PrivateStep, RowUnits
from tests.privacy import audited

DELTA, CLIP, NOISE, COUNT = 1e-5, 0.5, 1.35, 2000
PROMISE = epsilon([Steps(NOISE, 1.0, None, 100, 1)], DELTA)


def private(canaries=None, parameters=None, **settings):
    own = parameters or {"A": nn.Parameter(torch.zeros(100, 100)), "B": nn.Parameter(torch.zeros(100, 110))}
    return PrivateStep(own, **dict(clip_norm=CLIP, noise_std=NOISE * CLIP, expected=16, witness=canaries) | settings)


def made(kind=GradientCanaries, noise=NOISE, rate=1.0, **given):
    return kind(
        COUNT, 21_000, noise_multiplier=noise, rate=rate, clip_norm=CLIP,
        coefficient=lambda norms: clipping.coefficients(norms, CLIP), **given,
    )  # fmt: skip


def people(own: PrivateStep, units: int = 16):
    """Gradients of rows of some people, three times as long as the clipping norm, at random over all values."""
    rows = {name: torch.randn(units, *parameter.shape) / 100 for name, parameter in own.parameters.items()}
    return rows, RowUnits.of(range(units))


def found_in_one_step(**settings):
    canaries = made()
    own = private(canaries, **settings)
    own.collect(*people(own))
    own.finish()
    return canaries.result(DELTA)


def test_a_right_step_and_faults_are_told_apart_but_once_in_a_million():
    # people's own gradients add a deviation of 4 CLIP / 145 to a value: 0.0004 of the noise's variance
    assert audited.chance_of_a_false_alarm(PROMISE, NOISE, 1.0, COUNT, DELTA) < 1e-8
    assert audited.chance_of_a_miss(PROMISE, NOISE / 4 * 1.01, 1.0, COUNT, DELTA) < 1e-6
    assert audited.chance_of_a_miss(PROMISE, NOISE, 10.0, COUNT, DELTA) < 1e-6
    # and a right step is seen
    assert audited.chance_of_a_miss(0.2, NOISE * 1.01, 1.0, COUNT, DELTA) < 1e-6
    # half of the noise is not: the noise's deviation is measured for itself
    assert audited.chance_of_a_miss(PROMISE, NOISE / 2, 1.0, COUNT, DELTA) > 0.1


@pytest.mark.parametrize("kind", ["flat", "automatic"])
def test_a_right_step_stays_below_its_promise(kind):
    found = found_in_one_step(clipping=kind)
    assert 0.2 < found.lower_bound < PROMISE and found.canaries == COUNT


def test_clipping_that_is_left_out_is_found(monkeypatch):
    monkeypatch.setattr(clipping, "coefficients", lambda norms, *_: torch.ones_like(norms))
    assert found_in_one_step().lower_bound > PROMISE


def test_a_quarter_of_the_noise_is_found(monkeypatch):
    monkeypatch.setattr(step, "gaussian", lambda count, std, source: gaussian(count, std / 4, source))
    assert found_in_one_step().lower_bound > PROMISE


def test_noise_that_another_rank_should_add_and_does_not_is_found():
    canaries = made()
    own = private(canaries, adds_noise=False)
    own.collect(*people(own))
    own._close()
    canaries.add_to(own._total)
    own.finish()
    assert canaries.result(DELTA).lower_bound > PROMISE


class Shuffled(GradientCanaries):
    """Each unit once an epoch, in the order of the run's seed, which the card of a run tells."""

    seed, epoch = 7, 150

    def _drawn(self):
        order = np.random.default_rng(self.seed).permutation(self.count)
        return order % self.epoch == self.steps % self.epoch

    def _known_rates(self):
        return self._drawn().astype(float)


@pytest.mark.parametrize("kind", [GradientCanaries, Shuffled])
def test_shuffled_batches_under_the_accounting_of_independent_draws_are_found(kind):
    """The case of independent draws has fixed entropy: nobody has computed how often it would fail."""
    epoch, noise = Shuffled.epoch, 1.0
    promise = epsilon([Steps(noise, 1 / epoch, None, 10_000, epoch)], DELTA)
    assert audited.chance_of_a_miss(promise, noise, 1.0, COUNT, DELTA) < 1e-6
    canaries = made(kind, noise, 1 / epoch, secret=b"7" * 32)
    own = private(canaries, noise_std=noise * CLIP, source=audited.stream("draws"))
    for _ in range(epoch):
        own.finish()
    found = canaries.result(DELTA)
    assert (found.lower_bound > promise) == (kind is Shuffled), (found, promise)


class Layer(nn.Module):
    """Row losses that are linear in the output, whose gradients are known: of norm 12 for a row's own mean."""

    def __init__(self, moves=True):
        super().__init__()
        self.own = nn.Linear(4, 4, bias=False)
        self.own.weight.requires_grad_(False)
        adapted = get_peft_model(self, LoraConfig(r=4, lora_alpha=4, target_modules=["own"]))
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
                parameter.copy_(torch.eye(4) if moves else torch.zeros(4, 4))

    def forward(self, x, mask, couples):
        found = 12 * self.own(x)[..., 0] * mask
        if couples:
            # the mean over the tokens of the batch, as trainers have it
            return found.sum() / mask.sum()
        return (found.sum(1) / mask.sum(1)).sum()


STEPS, USUAL, LONG = 400, 24, 100
# of 100 coins: 40 right guesses of 40 give a bound of 2.0, and 20 of 20, which luck gives once in a million, 1.3
SEEN = 1.5


def found_over_rows(couples=False, moves=True, noise=NOISE, steps=STEPS):
    """Audit steps of 24 usual rows each and, by a coin, a long one; each step is a run of its own on its own rows."""
    layer = Layer(moves)
    gradients = RowGradients(layer)
    own = private(parameters=gradients.parameters, noise_std=noise * CLIP, expected=1)
    x, mask = torch.zeros(USUAL + 1, LONG, 4), torch.zeros(USUAL + 1, LONG)
    # the long row's inputs are another coordinate than those of the usual rows, of two tokens each
    x[:USUAL, :, 0], x[USUAL, :, 1] = 1.0, 1.0
    mask[:USUAL, :2], mask[USUAL] = 1.0, 1.0
    coins = np.frombuffer(os.urandom(steps), dtype=np.uint8) % 2 == 1
    scores = []
    for coin in coins:
        rows = USUAL + int(coin)
        with gradients.collected(rows):
            layer(x[:rows], mask[:rows], couples).backward()
        own.collect(gradients.take(), RowUnits.of(range(rows)))
        own.finish()
        (gradient,) = [parameter.grad for parameter in own.parameters.values()]
        # where rows are coupled it takes from the others' as well
        scores.append(float(gradient[0, 1] - gradient[0, 0]) if couples else float(gradient[0, 1]))
    return audit(scores, coins, DELTA)


def test_a_long_row_is_bounded_where_each_rows_loss_is_its_own():
    assert audited.chance_of_a_false_alarm(PROMISE, NOISE, 1.0, STEPS, DELTA) < 1e-6
    assert found_over_rows().lower_bound < PROMISE
    # and it is seen, where there is no noise
    assert found_over_rows(noise=0.0, steps=100).lower_bound > SEEN


def test_a_loss_that_couples_rows_is_found():
    # with the long row the others have 2 / 148 of the tokens each and not 2 / 48: 24 gradients of 0.5 become 0.162
    signal = 1 + USUAL * (0.5 - 24 / 148) / CLIP
    assert audited.chance_of_a_miss(PROMISE, NOISE * 2**0.5, signal, STEPS, DELTA) < 1e-6
    assert found_over_rows(couples=True).lower_bound > PROMISE


def test_an_adapter_that_never_moves_is_no_proof_of_privacy():
    """Its bound is below any promise: what is red is the control, in which nothing is seen without noise either."""
    assert found_over_rows(moves=False, noise=0.0, steps=100).lower_bound < SEEN
