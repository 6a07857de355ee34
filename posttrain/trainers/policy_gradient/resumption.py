"""What makes a resumed run of rollouts equal to the whole one: checkpoints where rollouts end, the order of prompts.

TRL keeps rollouts under way in memory only, and draws each epoch's order from a generator that no checkpoint holds.
"""

import math

import torch
from transformers import TrainerCallback

from posttrain.errors import ConfigError
from posttrain.log import get_logger


class SaveBetweenGenerations(TrainerCallback):
    """Delays a save within a generation to the step after which new rollouts are drawn.

    A run resumed in between would draw new rollouts for half-used prompts, and be out of step with its data from
    there on. The save at the end of training cannot wait: what it leaves is the final model, and a longer run is
    refused there. A run that resumes gets the order of prompts of its own epoch, see `skip_epochs`.
    """

    def __init__(self, trainer) -> None:
        self._trainer, self._due, self._said = trainer, False, False

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Advance a resumed run to where its checkpoint was written.

        Raises:
            ConfigError: the checkpoint lies inside a generation, and `check_resume` is set.
        """
        self._due = False
        if not state.global_step:
            return
        sized = hasattr(train_dataloader, "__len__")
        # transformers counts a stream as one epoch
        steps = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps) if sized else state.max_steps
        # epochs hold whole generations, whatever their last optimiser step holds
        used = state.global_step % steps * args.gradient_accumulation_steps % self._micro_batches(args)
        if used and state.global_step < state.max_steps:
            message = (
                f"the checkpoint of step {state.global_step} lies inside a generation ({used} of its "
                f"{self._micro_batches(args)} micro-batches are used), whose rollouts are not saved: it is where an "
                "earlier run ended. Resume from an earlier checkpoint, or start anew from its weights in another "
                "output_dir."
            )
            if args.check_resume:
                raise ConfigError(f"{message} To go on all the same, set `check_resume: false`.")
            get_logger().warning("%s Going on with new rollouts, out of step with the earlier run.", message)
        if self._trainer._train_sampler is not None:
            skip_epochs(self._trainer._train_sampler, state.global_step // steps)

    def on_step_end(self, args, state, control, **kwargs):
        between = self._trainer.may_stop_here()
        if control.should_training_stop and control.should_save and not between:
            get_logger().info(
                "the checkpoint of step %d lies inside a generation: it holds the final model, and a longer run cannot "
                "go on from it",
                state.global_step,
            )
        if not (control.should_save or self._due) or control.should_training_stop:
            return
        self._due, control.should_save = not between, between
        if self._due and not self._said:
            self._said = True
            get_logger().info("checkpoints wait for the next generation: rollouts under way are not saved")

    def _micro_batches(self, args) -> int:
        return args.steps_per_generation * self._trainer.num_iterations


def skip_epochs(sampler, epochs: int) -> None:
    """Advance the generator of a `trl` RepeatSampler, not yet used, by the permutations of `epochs` epochs."""
    if sampler.shuffle:
        for _ in range(epochs):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
