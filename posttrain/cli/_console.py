"""A quiet console for the verbs: upstream chatter off, progress bars where someone looks."""

import logging
import sys
import warnings


def quiet_libraries() -> None:
    """Silence what the libraries say in a run where all is well; their errors still come through.

    Call it before the libraries are imported: some speak while they are.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("trl", "peft", "accelerate", "bitsandbytes", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its logger's level itself when it is imported; a filter outlives that.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def progress_bar(total: int, label: str, unit: str):
    """A tqdm bar on stderr that vanishes when done; nothing where stderr is no terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, disable=not sys.stderr.isatty(), leave=False)


def training_bar(bar):
    """A trainer callback that moves `bar` a step at a time and shows the last loss."""
    from transformers import TrainerCallback

    class TrainingBar(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            bar.update(state.global_step - bar.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in (logs or {}):
                bar.set_postfix(loss=f"{logs['loss']:.3f}")

    return TrainingBar()
