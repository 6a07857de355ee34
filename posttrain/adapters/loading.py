"""Reading a saved adapter onto its base model, with the tokenizer beside it."""

import json
import os
import re
from pathlib import Path

from posttrain import model_sizes, patterns
from posttrain.checks import shorten
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.log import get_logger
from posttrain.models import (
    SMOLLM2_FOLDER,
    TINY_FOLDER,
    check_holds_safetensors,
    check_runs_no_code,
    embedded_name,
    is_cached,
    resolve_model,
)
from posttrain.remote import check_model_name, model_failure
from posttrain.saved import check_safetensors, check_shards, read_text
from posttrain.visible import one_line

# what PEFT and torch raise where an adapter's config and weights are none for a model
UNFIT = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
# of an adapter that repeats layers
_MOST_TIMES = 10
# a model's folder in the cache of any version
_OF_THE_CACHE = re.compile(rf"[/\\]models[/\\](?:{SMOLLM2_FOLDER}|{TINY_FOLDER})-[0-9a-f]{{8}}$")


def base_of(folder: str | Path, base: str | None = None) -> tuple[str, str | None]:
    """Return the name or path of an adapter's base model, and its revision: `base`, or else what the adapter names.

    Raises ConfigError for a folder without a readable adapter, and an adapter that names no base.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise ConfigError(f"adapter is {folder}, which has no adapter_config.json; give an adapter's folder.")
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise ConfigError(f"adapter is {folder}, which has no adapter_model.safetensors; give an adapter's folder.")
    config = _config_of(folder)
    if base:
        return resolve_model(base), None
    named = config.get("base_model_name_or_path")
    if not named or not isinstance(named, str) or one_line(named) != named:
        raise ConfigError(f"the adapter in {folder} names no base model; give it with --base MODEL.")
    # a cached folder may be another machine's, cleared or damaged by now; any other that is there is the base itself
    embedded = embedded_name(named) if is_cached(named) or not os.path.lexists(named) else None
    if embedded is None and _OF_THE_CACHE.search(named) and not os.path.lexists(named):
        raise ConfigError(
            f"the adapter in {folder} was trained on {named}, an embedded model as another version of posttrain wrote "
            "it, which is not here. Where that model is this version's as well, give it: --base embedded:NAME."
        )
    return resolve_model(embedded or named), config.get("revision")


def _config_of(folder: str | Path) -> dict:
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid JSON: {str(error).rstrip('.')}.") from None
    return config if isinstance(config, dict) else {}


def load_adapter(folder: str | Path, base: str | None = None, dtype: str = "auto", *, to_merge: bool = False):
    """Load a base model with an adapter on it, in eval mode: a `PeftModel`.

    Args:
        folder: the adapter's: adapter_config.json and adapter_model.safetensors.
        base: hub id, folder or `embedded:` name. Default: the base that the adapter names.
        dtype: of the base: bfloat16, float16, float32, or auto for its own.
        to_merge: refuse a base that is stored quantised: merging would change it.

    Raises:
        ConfigError: no adapter there, one that names no base, a base that is not there or that the adapter does not
            fit, one that cannot be merged into, patterns that may take for ever to match, or sizes of no model.
        DataError: weights that are damaged: the adapter's, or those of a base in a folder.
        EnvironmentIssue: a base that only the hub has, which cannot be reached.
    """
    source, revision = base_of(folder, base)
    patterns_found = patterns.check_adapter(_config_of(folder), f"the adapter in {folder}: ")
    check_safetensors(Path(folder) / "adapter_model.safetensors")
    check_model_name(source)
    _check_base(Path(source))
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        model_sizes.check_folder(source, revision)
        config = AutoConfig.from_pretrained(source, revision=revision)
        check_runs_no_code(config, source)
        check_holds_safetensors(source, config)
        if to_merge and getattr(config, "quantization_config", None):
            raise ConfigError(
                f"the base model {source} is stored quantised; merging into it would change it. Keep the adapter "
                "beside it, or merge into the unquantised model: --base MODEL."
            )
        _check_against(_config_of(folder), config.get_text_config(), f"the adapter in {folder}")
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype)
    except ConfigError:
        raise
    except ImportError as error:
        raise EnvironmentIssue(f"the base model {source} needs a package that is missing: {error}") from error
    except (OSError, ValueError) as error:
        raise model_failure(source, error, "cannot be loaded as the adapter's base") from error
    if patterns_found:
        names = [name for name, _ in model.named_modules()]
        patterns.check_on(patterns_found, names, f"the adapter in {folder}")
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except ImportError as error:
        reason = " ".join(str(error).split())[:300]
        raise EnvironmentIssue(f"the adapter in {folder} needs a package that is missing: {reason}") from error
    except (*UNFIT, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"the adapter in {folder} does not fit the base model {source}: {reason} Give the base that it was "
            "trained on with --base MODEL."
        ) from error


def placed(model):
    """Move a loaded model to the accelerator, where there is one with room for it, and return it.

    A quantised model, or one that was spread over devices, stays where its loading has put it. One that does not fit
    stays on the CPU, which is said.
    """
    import torch

    if not torch.accelerator.is_available() or getattr(model, "is_quantized", False):
        return model
    if getattr(model, "hf_device_map", None):
        return model
    device = torch.accelerator.current_accelerator()
    try:
        return model.to(device)
    except torch.OutOfMemoryError:
        get_logger().warning("the model does not fit into the memory of %s, so the CPU computes", device)
        return model.to("cpu")


def _check_against(adapter: dict, config, said: str) -> None:
    """Raise ConfigError for an adapter's config with layers or tokens that its base does not have, or far more of them.

    Args:
        config: of the base's text model.
        said: which adapter, for the error.
    """
    layers, ranges = getattr(config, "num_hidden_layers", None), adapter.get("layer_replication")
    if ranges and layers:
        whole = isinstance(ranges, list) and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(type(end) is int for end in pair)
            and 0 <= pair[0] < pair[1] <= layers
            for pair in ranges
        )
        if not whole or sum(end - begin for begin, end in ranges) > _MOST_TIMES * layers:
            raise ConfigError(
                f"{said}: layer_replication is {shorten(ranges)}; it takes pairs [first, end] of the base's {layers} "
                f"layers, of {_MOST_TIMES} times as many in all at most."
            )
    size, given = getattr(config, "vocab_size", None), adapter.get("trainable_token_indices")
    for tokens in given.values() if isinstance(given, dict) else [given]:
        if (
            tokens
            and size
            and not (isinstance(tokens, list) and all(type(token) is int and 0 <= token < size for token in tokens))
        ):
            raise ConfigError(
                f"{said}: trainable_token_indices is {shorten(tokens)}; it takes tokens of the base, 0 to {size - 1}."
            )


def _check_base(folder: Path) -> None:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        check_safetensors(whole)
    elif index.is_file():
        check_shards(index)


def tokenizer_beside(folder: str | Path, base: str | None = None, own: bool | None = None):
    """Return the tokenizer saved with an adapter, or else its base model's. Raises as `load_adapter`.

    `own`: whether there is one with the adapter; default: where its config lies there.
    """
    from posttrain.data.processing import load_processing_class, tokenizer_of

    own = (Path(folder) / "tokenizer_config.json").is_file() if own is None else own
    source, revision = (str(folder), None) if own else base_of(folder, base)
    return tokenizer_of(load_processing_class(source, revision))
