"""What a settings file may not do by itself: run code, change the programs that run, write elsewhere, send away."""

import json
import re
from collections.abc import Mapping

from posttrain.checks import near
from posttrain.config.deepspeed_paths import check_paths
from posttrain.errors import ConfigError
from posttrain.log import LEVELS
from posttrain.visible import one_line

# Variables of the number of threads and devices, of notes, of names in a tracker. Not among them: what says where
# programs, libraries, caches, tokens or servers are.
VARIABLES = frozenset(
    """
    ACCELERATE_LOG_LEVEL BITSANDBYTES_NOWELCOME COMET_PROJECT_NAME CUBLAS_WORKSPACE_CONFIG CUDA_DEVICE_MAX_CONNECTIONS
    CUDA_DEVICE_ORDER CUDA_LAUNCH_BLOCKING CUDA_VISIBLE_DEVICES DATASETS_VERBOSITY HF_DATASETS_OFFLINE
    HF_HUB_DISABLE_PROGRESS_BARS HF_HUB_DISABLE_TELEMETRY HF_HUB_DOWNLOAD_TIMEOUT HF_HUB_ETAG_TIMEOUT HF_HUB_OFFLINE
    HF_HUB_VERBOSITY MKL_NUM_THREADS MLFLOW_EXPERIMENT_NAME MLFLOW_RUN_ID NCCL_ASYNC_ERROR_HANDLING NCCL_DEBUG
    NCCL_IB_DISABLE NCCL_P2P_DISABLE NCCL_SHM_DISABLE NUMEXPR_NUM_THREADS OMP_NUM_THREADS OPENBLAS_NUM_THREADS
    POSTTRAIN_LOG PYTORCH_ALLOC_CONF PYTORCH_CUDA_ALLOC_CONF RAYON_NUM_THREADS TOKENIZERS_PARALLELISM
    TORCH_CPP_LOG_LEVEL TORCH_DISTRIBUTED_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING TORCH_NCCL_BLOCKING_WAIT
    TRACKIO_PROJECT TRANSFORMERS_NO_ADVISORY_WARNINGS TRANSFORMERS_OFFLINE TRANSFORMERS_VERBOSITY VECLIB_MAXIMUM_THREADS
    WANDB_DISABLED WANDB_MODE WANDB_NAME WANDB_NOTES WANDB_PROJECT WANDB_RUN_GROUP WANDB_SILENT WANDB_TAGS
    """.split()
)


_OF_LEVELS = ("POSTTRAIN_LOG", "ACCELERATE_LOG_LEVEL")
_OF_NUMBERS = ("_NUM_THREADS", "_MAXIMUM_THREADS", "_TIMEOUT", "_MAX_CONNECTIONS")
_WHOLE_NUMBER = re.compile(r"[1-9]\d{0,8}")

# Settings with texts that a model reads or writes, such as the ends of an answer; all others are names and numbers
_TEXTS = ("generation_kwargs", "chat_template_kwargs")


def check_variable(name: str, place: str) -> None:
    """Raise ConfigError for a variable of `env:` by which programs, libraries, servers or accounts are chosen."""
    if name not in VARIABLES:
        raise ConfigError(
            f"{place}: `env` sets {one_line(name)}, which a settings file may not: it takes names of threads, devices, "
            f"offline modes and trackers' projects, such as {near(name, VARIABLES) or 'OMP_NUM_THREADS'}; "
            f"docs/strangers.md lists them. Set it in the shell: `{one_line(name)}=... posttrain train ...`."
        )


def value_of_variable(name: str, value, place: str) -> str:
    """Return the text of a variable of `env:`.

    Raises ConfigError for a value that is none, or that the library which reads it would trip over.
    """
    said = f"{place}: `env` sets {name} to {one_line(value)}"
    if not isinstance(value, str | int | float):
        raise ConfigError(f"{said}; a variable's value is a text or a number. Write one, or leave it out.")
    text = str(value)
    if name in _OF_LEVELS and text.lower() not in LEVELS:
        raise ConfigError(f"{said}; it must be one of {', '.join(LEVELS)}.")
    if name.endswith(_OF_NUMBERS) and (isinstance(value, bool) or not _WHOLE_NUMBER.fullmatch(text)):
        raise ConfigError(f"{said}; it must be a whole number above 0.")
    return text


def check_setting(name: str, value, place: str) -> None:
    """Raise ConfigError for a setting of a file that would run code of others, send completions away or forge lines."""
    given, value = value, _of_json(name, value, place)
    for key, held in ((name, given), *_entries(name, value)):
        for text in (key, *([] if name in _TEXTS else [held])):
            if isinstance(text, str) and one_line(text) != text:
                what = "is" if held is given else "holds"
                raise ConfigError(
                    f"{place}: `{name}` {what} {one_line(text)}, with a line break or a character that steers a "
                    "console. Write it without."
                )
    if name == "allow_code":
        raise ConfigError(
            f"{place}: `allow_code` says which code you trust, so it is for the command line: --allow_code MODULE. "
            "Leave it out here."
        )
    if name == "deepspeed":
        check_paths(value, place)
    if name == "log_completions_hub_repo" and value is not None:
        raise ConfigError(
            f"{place}: `log_completions_hub_repo: {value}` sends prompts and completions away, which a settings file "
            f"alone does not. Where that is wanted, leave it out here and add --log_completions_hub_repo {value} to "
            "the command line."
        )
    for key, held in _entries(name, value):
        if key in ("trust_remote_code", "use_kernels") and held not in (None, False, "false", "False", "no", "0", 0):
            raise ConfigError(
                f"{place}: `{key}: {str(held).lower()}` runs code from the hub or the model's folder, which a settings "
                f"file alone does not. Where you trust that model, leave it out here and add --{key} true to the "
                "command line."
            )
        # a hub id in the place of an implementation's name loads compiled code from there
        if key in ("attn_implementation", "experts_implementation") and "/" in str(held):
            raise ConfigError(
                f"{place}: `{key}: {held}` loads compiled code from the hub, which a settings file alone does not. "
                f"Where you trust it, leave it out here and add --{key} {held} to the command line."
            )


def _of_json(name: str, value, place: str):
    """Return the mapping or list in a text of JSON, as transformers takes one for a mapping; else the value itself."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except RecursionError:
            raise ConfigError(f"{place}: `{name}` is nested too deeply.") from None
        except ValueError:
            pass
    return value


def _entries(name: str, value):
    waiting = [(name, value)]
    while waiting:
        key, held = waiting.pop()
        yield key, held
        inside = held.items() if isinstance(held, Mapping) else []
        if isinstance(held, list):
            inside = [("", part) for part in held]
        waiting += [(str(key), part) for key, part in reversed(list(inside))]
