"""What every trainer's run has: a method's seams, exact resumption, watches over loss and gradients, evaluation."""

import math
from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.run import devices, evaluation
from posttrain.run.construction import ConstructionMixin
from posttrain.run.construction import without_folder as without_folder
from posttrain.run.passes import PassesMixin
from posttrain.run.private_seams import PrivateMixin
from posttrain.run.resumption import ResumptionMixin
from posttrain.run.saving import SavingMixin
from posttrain.run.steps import StepsMixin


class RunMixin(ResumptionMixin, StepsMixin, PrivateMixin, ConstructionMixin, SavingMixin, PassesMixin):
    """Runs any family's trainer: construct, train, resume, save, push. Stands on `transformers.Trainer`.

    A method has these seams, whatever its family: `around_policy_forward`, `method_state` and `load_method_state`,
    `attach_adapter`, `save_beside`.
    """

    # whether a save may fall on another step than the settings say
    saves_may_wait = False
    # of a metric that an evaluation has measured nowhere
    no_value = math.nan

    @property
    def weights_have_noise(self) -> bool:
        """Return whether an adapter adds noise to the weights of forwards that are trained; others have none."""
        return self._scheme.noise_kind != "none"

    @property
    def weight_noise_kind(self) -> str:
        """Return the kind of that noise: gaussian, uniform or none."""
        return self._scheme.noise_kind

    def calibration_ids(self, rows):
        """Yield the tokens of rows of data, each sequence on its own, that an adapter is calibrated on."""
        for row in rows:
            ids, start = row["input_ids"], 0
            # of a packed row each of its sequences
            for length in row.get("seq_lengths") or [len(ids)]:
                yield list(ids[start : start + length])
                start += length

    def method_state(self) -> dict:
        """Return what a method needs beside weights to go on from a checkpoint, as plain JSON; rank 0's is kept."""
        return {} if self._private is None else {"privacy": self._private.state()}

    def load_method_state(self, state: dict) -> None:
        """Restore what `method_state` returned when the checkpoint was written; empty if another method wrote it."""
        if self._private is not None:
            self._private.load(state.get("privacy") or {})
        elif state.get("privacy") and self.args.check_resume:
            raise ConfigError(
                "the checkpoint is of a private run, and this one is not: its steps would end the promise. Give the "
                "private settings of that run, or set `check_resume: false`."
            )

    def found_by_method(self) -> dict[str, object]:
        """Return what a method found out when training began, by name, for card and report."""
        return {}

    def may_stop_here(self) -> bool:
        """Return whether a checkpoint of this step can be gone on from; asked at the end of a step."""
        return True

    def attach_adapter(self) -> None:
        """Change the adapter's modules as a method needs, after construction and after a checkpoint's weights load."""

    def save_beside(self, folder: Path, in_checkpoint: bool) -> None:
        """Write a method's own files beside a saved model or adapter; called on the main rank."""

    # stands on Trainer.evaluation_loop, which alone is told the name of the set, by evaluate and predict alike
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        devices.check_is_placed(self)
        self._claim_folder()
        evaluation.forget(self)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self.finish_evaluation(dataloader, description)
        output.metrics.update(evaluation.take_metrics(self, metric_key_prefix))
        return output

    def finish_evaluation(self, dataloader, description: str) -> None:
        """Add a family's own metrics to TRL's at the end of an evaluation; all ranks call it."""
