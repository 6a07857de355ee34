"""Checkpoints where rollouts end: TRL keeps those under way in memory only."""

from transformers import TrainerCallback

from posttrain.log import get_logger


class SaveBetweenGenerations(TrainerCallback):
    """Moves a save that falls among the steps of one generation to the step after which new rollouts are drawn.

    A run resumed in between would draw new rollouts for half-used prompts, and be out of step with its data from
    there on.
    """

    def __init__(self, trainer) -> None:
        self._trainer, self._due, self._said = trainer, False, False

    def on_step_end(self, args, state, control, **kwargs):
        between = self._trainer._step % (args.steps_per_generation * self._trainer.num_iterations) == 0
        if not (control.should_save or self._due) or control.should_training_stop:
            return
        self._due, control.should_save = not between, between
        if self._due and not self._said:
            self._said = True
            get_logger().info("checkpoints wait for the next generation: rollouts under way are not saved")
