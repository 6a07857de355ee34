"""Ends a run early with a checkpoint that it goes on from: at a signal, or after `max_minutes`."""

import contextlib
import functools
import math
import signal
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


def taken() -> tuple[int, ...]:
    """Return the signals that ask for a checkpoint; not those that the caller handles itself, as `submitit` does."""
    names = (name for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
    ours = (signal.SIG_DFL, signals.raise_terminated)
    return tuple(getattr(signal, name) for name in names if signal.getsignal(getattr(signal, name)) in ours)


def keep_workers(loader):
    """Have a data loader's workers outlive a SIGTERM to each process of a job: the run ends them after its checkpoint.

    Returns the loader.
    """
    # the one that accelerate's goes through
    inner = getattr(loader, "base_dataloader", loader)
    if getattr(inner, "num_workers", 0):
        inner.worker_init_fn = functools.partial(_begin_worker, inner.worker_init_fn)
    return loader


def _begin_worker(begin, number: int) -> None:
    signals.heed_parent_alone(signal.SIGTERM)
    if begin is not None:
        begin(number)


class StopEarly(TrainerCallback):
    """Ends training after a step in which a signal came or the minutes ran out, with a checkpoint of that step.

    All ranks end after the same step: each tells the others at the end of every step whether it was asked to. The
    minutes are over where the longest way so far from one place that can be gone on from to the next would not fit.
    """

    def __init__(self, trainer) -> None:
        self._trainer = trainer
        self._begin()

    def _begin(self) -> None:
        self._requests, self._said, self.reason = signals.Requests(), False, None
        self._last, self._longest = time.monotonic(), 0.0
        self._began = self._last if signals.began is None else signals.began

    @contextlib.contextmanager
    def watching(self):
        """Note signals inside, in place of ending at once."""
        self._begin()
        numbers = taken() if self._trainer.args.save_on_signal == "auto" else ()
        with signals.handled(self._requests.note, numbers):
            yield

    def on_step_end(self, args, state, control, **kwargs):
        may_stop = self._trainer.may_stop_here()
        asked = self._asked(args, may_stop)
        if asked == _NOTHING:
            return
        if not may_stop:
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
        # a checkpoint without optimizer is none to go on from
        self._saves_alone, args.save_only_model = args.save_only_model, False

    # the epoch is not at its end, whatever upstream's strategies have to say
    def on_epoch_end(self, args, state, control, **kwargs):
        if self.reason is not None:
            control.should_log = control.should_evaluate = control.should_save = False

    def _asked(self, args, may_stop: bool) -> int:
        """Return what any rank was asked for: one more than a signal's number; or that the minutes are over."""
        if args.save_on_signal == "never" and args.max_minutes is None:
            return _NOTHING
        now = time.monotonic()
        if may_stop:
            self._longest, self._last = max(self._longest, now - self._last), now
        over = args.max_minutes is not None and now - self._began + self._longest >= 60 * args.max_minutes
        mine = self._requests.number + 1 if self._requests.number else (_TIME if over else _NOTHING)
        if args.world_size == 1:
            return mine
        told = torch.tensor(mine, device=args.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return int(told)

    @staticmethod
    def _reason_of(asked: int, args) -> str:
        if asked == _TIME:
            return f"max_minutes: {args.max_minutes:g} leave no time to go on"
        return f"{signal.Signals(asked - 1).name} came"

    def end(self) -> None:
        """End the run if it was stopped early; raises Preempted."""
        if self.reason is None:
            return
        state, args = self._trainer.state, self._trainer.args
        args.save_only_model = self._saves_alone
        # a launcher ends the others as soon as one of them has ended
        self._trainer.accelerator.wait_for_everyone()
        ended = Preempted(
            f"{self.reason}: the run ended after step {state.global_step} of {state.max_steps} with the checkpoint "
            f"{args.output_dir}/checkpoint-{state.global_step}; start it again with `resume_from_checkpoint: auto` to "
            "go on."
        )
        if signals.began is None:
            # no recipe, whose end says it
            get_logger().warning("%s", ended)
        raise ended
