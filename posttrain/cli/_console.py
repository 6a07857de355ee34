"""A quiet console for the verbs: upstream chatter off, progress bars where someone looks."""

import sys


def progress_bar(total: int, label: str, unit: str):
    """Make a tqdm bar on stderr that vanishes when done; nothing where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def training_bar(bar):
    """Make a trainer callback that moves `bar` a step at a time and shows the last loss."""
    from transformers import TrainerCallback

    class TrainingBar(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            bar.update(state.global_step - bar.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                bar.set_postfix(loss=f"{logs['loss']:.3f}")

    return TrainingBar()
