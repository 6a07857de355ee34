"""Importing this keeps a few lines off a recipe's console that upstream libraries print in every run on a CPU.

    import posttrain.quiet  # noqa: F401

Import it before the libraries: bitsandbytes speaks while it is imported. Only these lines go; what is a warning about
the run at hand still comes through.
"""

import logging
import warnings

# (logger, how the line begins)
_LINES = (
    # where DeepSpeed is installed, whether it is used or not
    ("DeepSpeed", "Setting accelerator to CPU."),
    # of kernels for 4-bit inference, which training does not use
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
)


def _filter(beginning: str):
    return lambda record: not record.getMessage().startswith(beginning)


for _name, _beginning in _LINES:
    logging.getLogger(_name).addFilter(_filter(_beginning))
# transformers is renaming what TRL still sets
warnings.filterwarnings("ignore", message="`(is_)?gradient_checkpointing` is deprecated", category=FutureWarning)


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
