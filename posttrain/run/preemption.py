"""Ends a run early with a checkpoint that it goes on from: at a signal, or after `max_minutes`."""

import contextlib
import math
import time

import torch
from transformers import TrainerCallback

from posttrain import signals
from posttrain.errors import ConfigError, ExcludedSetting, Preempted
from posttrain.log import get_logger

CHOICES = ("auto", "never")
_NOTHING, _TIME = 0, 1


def check(args) -> None:
    """Check `save_on_signal` and `max_minutes`; read transformers' `enable_jit_checkpoint` as the former.

    Raises ConfigError.
    """
    if args.save_on_signal not in CHOICES:
        raise ConfigError(f"save_on_signal is {args.save_on_signal!r}; it must be one of {', '.join(CHOICES)}.")
    minutes = args.max_minutes
    if minutes is not None and (
        isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes < math.inf
    ):
        raise ConfigError(f"max_minutes is {minutes!r}; give a number of minutes above 0, or leave it out.")
    if args.enable_jit_checkpoint and args.save_on_signal == "never":
        raise ExcludedSetting(
            "enable_jit_checkpoint is true and save_on_signal is never; leave one of them out.",
            {"enable_jit_checkpoint": ("save_on_signal",), "save_on_signal": ("enable_jit_checkpoint",)},
        )
    # upstream saves between a step's backward and its update, with random numbers drawn that are drawn again
    args.enable_jit_checkpoint = False


class StopEarly(TrainerCallback):
    """Ends training after a step in which a signal came or the minutes ran out, with a checkpoint of that step.

    All ranks end after the same step: each tells the others at the end of every step whether it was asked to.
    """

    def __init__(self, trainer) -> None:
        self._trainer, self._requests, self._began = trainer, signals.Requests(), time.monotonic()
        self._said, self.reason = False, None

    @contextlib.contextmanager
    def watching(self):
        """Note signals inside, in place of ending at once."""
        self._requests, self._began = signals.Requests(), time.monotonic()
        self._said, self.reason = False, None
        numbers = signals.ending() if self._trainer.args.save_on_signal == "auto" else ()
        # a terminal that is closed leaves nobody to go on
        numbers = tuple(number for number in numbers if number != getattr(signals.signal, "SIGHUP", None))
        with signals.handled(self._requests.note, numbers):
            yield

    def on_step_end(self, args, state, control, **kwargs):
        asked = self._asked(args)
        if asked == _NOTHING:
            return
        if not self._trainer.may_stop_here():
            if not self._said:
                self._said = True
                get_logger().warning(
                    "%s: the run ends where rollouts end, which are not saved", self._reason_of(asked, args)
                )
            return
        self.reason = self._reason_of(asked, args)
        if control.should_evaluate:
            get_logger().warning(
                "%s: the evaluation that was due at step %d is left out", self.reason, state.global_step
            )
        control.should_evaluate, control.should_save, control.should_training_stop = False, True, True

    def _asked(self, args) -> int:
        """Return what any rank was asked for: a signal's number, negative; or that the minutes are over."""
        if args.save_on_signal == "never" and args.max_minutes is None:
            return _NOTHING
        over = args.max_minutes is not None and time.monotonic() - self._began >= 60 * args.max_minutes
        mine = (self._requests.number or 0) + 1 if self._requests.number else (_TIME if over else _NOTHING)
        if args.world_size == 1:
            return mine
        told = torch.tensor(mine, device=args.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return int(told)

    @staticmethod
    def _reason_of(asked: int, args) -> str:
        if asked == _TIME:
            return f"max_minutes: {args.max_minutes:g} are over"
        return f"{signals.signal.Signals(asked - 1).name} came"

    def end(self) -> None:
        """End the run if it was stopped early; raises Preempted."""
        if self.reason is None:
            return
        state, args = self._trainer.state, self._trainer.args
        # a launcher ends the others as soon as one of them has ended
        self._trainer.accelerator.wait_for_everyone()
        raise Preempted(
            f"{self.reason}: the run ended after step {state.global_step} of {state.max_steps} with the checkpoint "
            f"{args.output_dir}/checkpoint-{state.global_step}; start it again with `resume_from_checkpoint: auto` to "
            "go on."
        )
