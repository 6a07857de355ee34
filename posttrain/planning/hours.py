"""Time of a run between a floor and a ceiling, from multiplications and the cards' rates by data sheet."""

from dataclasses import dataclass

from posttrain.planning.cards import Card
from posttrain.planning.job import Job, Launch

# Shares of a card's rate that training reaches, from small models to well-filled large ones: what public reports name.
UTILISATION = (0.15, 0.50)
# of the memory's rate, by rollouts
READING = (0.15, 0.60)
# rollouts that a card writes at a time, at most
_AT_A_TIME = 256


@dataclass(frozen=True)
class Hours:
    """Hours between which a number of steps lies, of its parts and in all."""

    training: tuple[float, float]
    generation: tuple[float, float] = (0.0, 0.0)

    @property
    def total(self) -> tuple[float, float]:
        return self.training[0] + self.generation[0], self.training[1] + self.generation[1]


def flops_per_token(job: Job, mean_length: float) -> float:
    """Return the multiplications and additions that a token of a training row costs, in all passes."""
    shapes = job.shapes
    matrices = 2.0 * (shapes.linears + shapes.head)
    # a token looks back on half of its row
    forward = matrices + 4.0 * shapes.layers * shapes.query_width * mean_length / 2
    # of frozen matrices no gradient is computed but that of their inputs
    passes = 3.0 if shapes.adapter is None else 2.0
    passes = (passes + job.checkpointing) * (1 + job.twice) + (job.reference != "none") + job.more_forwards
    return passes * forward


def estimate(job: Job, launch: Launch, card: Card, steps: int, mean_length: float) -> Hours | None:
    """Return the hours that so many steps take; None for a card whose rates are not known.

    mean_length: tokens of a row on average.
    """
    if card.flops is None or card.bandwidth is None:
        return None
    a_step = job.drawn / launch.processes if job.drawn else job.rows * job.accumulation
    tokens = a_step * steps * mean_length
    cost = tokens * flops_per_token(job, mean_length) / card.flops / 3600
    low, high = UTILISATION
    training = (cost / high, cost / low)
    if not job.answers:
        return Hours(training)
    rollouts = job.rows * job.accumulation * steps
    written = rollouts * max(mean_length - job.prompt, 1.0)
    at_a_time = min(_AT_A_TIME, job.answers)
    shapes, half = job.shapes, min(job.weight_bytes, 2.0)
    cache = 2 * shapes.key_width * shapes.layers * 2.0 * mean_length / 2
    # each token of all rollouts at work reads all weights once, and each its own keys and values
    read = written / at_a_time * shapes.parameters * half + written * cache
    spent = read / card.bandwidth / 3600
    return Hours(training, (spent / READING[1], spent / READING[0]))
