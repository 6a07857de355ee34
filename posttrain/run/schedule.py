"""The learning rate's schedule of a run that goes on with another number of steps than it was planned with.

Most schedules are a curve over all steps. Where a run that goes on has another number of them, the rest of the curve is
stretched, or pressed together, over the steps to come: the rate goes on from where it was, and reaches the curve's end
with the last step. A curve that would have been the same so far under the new number is simply taken anew.
"""

import functools
import itertools
import math
import warnings
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.run.checks import upstream_refusals

# What remains of a curve at or below this share of its peak teaches nothing
_ENDED = 0.01
_POINTS = 1000


def check(args) -> None:
    """Refuse a schedule that upstream would only trip over once the model is loaded. Raises ConfigError."""
    name, settings = args.lr_scheduler_type.value, args.lr_scheduler_kwargs
    with upstream_refusals(f"lr_scheduler_type {name} cannot be built with lr_scheduler_kwargs {settings}"):
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
        get_scheduler(
            name, optimiser, args.get_warmup_steps(100), num_training_steps=100, scheduler_specific_kwargs=settings
        )


@dataclass(frozen=True)
class Schedule:
    """Maps each step of a run to a place on a learning rate curve over `total` steps.

    Attributes:
        total: the steps that the curve is drawn over.
        knots: (step, place on the curve) in order, straight lines between them; empty where both are the same.
    """

    total: int
    knots: tuple[tuple[int, float], ...] = ()

    @property
    def end(self) -> int:
        """Return the number of steps of the run."""
        return self.knots[-1][0] if self.knots else self.total

    def place(self, step: int) -> float:
        """Return where on the curve a step lies."""
        if not self.knots:
            return step
        for (before, start), (after, stop) in itertools.pairwise(((0, 0.0), *self.knots)):
            if step <= after:
                return start + (stop - start) * (step - before) / (after - before) if after > before else stop
        return self.knots[-1][1]

    def up_to(self, step: int, end: int) -> "Schedule":
        """Return the same schedule up to `step`, with the rest of the curve spread over the steps to `end`."""
        place = self.place(step)
        kept = tuple(knot for knot in self.knots if knot[0] < step)
        here = ((step, place),) if step else ()
        return Schedule(self.total, (*kept, *here, (end, float(self.total))))

    def as_content(self) -> dict:
        return {"total": self.total, "knots": [list(knot) for knot in self.knots]}

    @classmethod
    def of(cls, content: dict) -> "Schedule":
        return cls(int(content["total"]), tuple((int(step), float(place)) for step, place in content["knots"]))


@dataclass
class Current:
    """Holds a run's schedule, and that of the run whose checkpoint it resumes. Copies of a trainer share it.

    Attributes:
        resumed: None where a run starts anew.
        now: None before training, and where DeepSpeed makes its own.
    """

    resumed: Schedule | None = None
    now: Schedule | None = None

    @property
    def changed(self) -> bool:
        return self.resumed is not None and self.resumed != self.now


def continued(args, then: Schedule, done: int, steps: int) -> Schedule:
    """Return the schedule of a resumed run whose number of steps may have changed, and log what it means.

    Args:
        args: the trainer's config.
        then: the schedule of the run that wrote the checkpoint.
        done: the steps that were taken.
        steps: how many the run now has.

    Raises:
        ConfigError: fewer steps than were taken; or more, where the curve has come to its end. Neither is refused with
            `check_resume: false`.
    """
    if steps < done and args.check_resume:
        raise ConfigError(
            f"the run has {steps} steps (max_steps, or num_train_epochs), and the checkpoint was written after {done}: "
            "nothing is left to train. Give it more steps, or resume from an earlier checkpoint. To go on all the "
            "same, set `check_resume: false`."
        )
    if steps == then.end or steps <= done:
        return then
    name = args.lr_scheduler_type.value
    before = curve(args, then.total)
    if before is None:
        return Schedule(steps)
    anew = curve(args, steps)
    if not then.knots and all(before(step) == anew(step) for step in range(done)):
        return Schedule(steps)
    last = max(done - 1, 0)
    schedule = then.up_to(last, steps)
    rates = [bent(before, schedule, step) for step in _spread(done, steps)]
    reached = bent(before, then, last)
    peak = max(before(place) for place in _spread(0, then.total))
    told = f"{args.learning_rate * reached:.3g}"
    if max(rates) <= _ENDED * peak and steps > then.end and args.check_resume:
        raise ConfigError(
            f"the run has {steps} steps (max_steps, or num_train_epochs), and the checkpoint of step {done} is of one "
            f"that had {then.end}, whose {name} schedule has come to its end: the last rate was {told}, and what "
            "follows would train next to nothing. Start a new run from its weights, in another output_dir. To go on "
            "from that rate all the same, set `check_resume: false`."
        )
    if max(rates) > min(rates) or rates[0] != reached:
        get_logger().warning(
            "the run has %d steps, and the checkpoint of step %d is of one that had %d: the rest of its %s schedule is "
            "spread over the steps to come. The learning rate goes on from %s and is %.3g at the last step; this is "
            "not the schedule of a run of %d steps from the start.",
            steps,
            done,
            then.end,
            name,
            told,
            args.learning_rate * rates[-1],
            steps,
        )
    return schedule


def curve(args, total: int):
    """Return the learning rate factor by the place on a schedule of `total` steps; None where it is no curve."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    with warnings.catch_warnings():
        # upstream says it where the run's own scheduler is made
        warnings.simplefilter("ignore")
        scheduler = get_scheduler(
            args.lr_scheduler_type,
            optimiser,
            args.get_warmup_steps(total),
            num_training_steps=total,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    return scheduler.lr_lambdas[0] if isinstance(scheduler, LambdaLR) else None


def bend(scheduler, schedule: Schedule) -> None:
    """Make a scheduler follow the places of a schedule over the curve."""
    if schedule.knots and isinstance(scheduler, LambdaLR):
        scheduler.lr_lambdas = [functools.partial(bent, factor, schedule) for factor in scheduler.lr_lambdas]


def move_to(scheduler, step: int) -> None:
    """Set a scheduler, and the rates of its optimiser, to a step; one that is no LambdaLR stays as it is."""
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def bent(factor, schedule: Schedule, step: int) -> float:
    """Return the learning rate factor at a step, interpolated where its place is between two whole ones."""
    place = schedule.place(step)
    low = math.floor(place)
    between = place - low
    return factor(low) if not between else factor(low) * (1 - between) + factor(low + 1) * between


def _spread(first: int, last: int) -> list[int]:
    """Return evenly spread whole numbers from `first` to before `last`, both ends among them."""
    number = min(max(last - first, 1), _POINTS)
    return sorted({first + i * max(last - 1 - first, 0) // max(number - 1, 1) for i in range(number)})
