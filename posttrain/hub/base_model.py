"""Which model a run started from, and under which name and license the hub knows it."""

import re
from pathlib import Path

from posttrain.errors import ConfigError, DataError
from posttrain.hub.metadata import license_fields, read_metadata
from posttrain.models import SMOLLM2, TINY, embedded_name
from posttrain.saved import read_json, read_yaml

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")
# What a checkpoint of ours, and a run, say that they are; a trainer's state is in every checkpoint
_MARKER, _NOTE, _STATE = "posttrain_complete.json", "posttrain_run.json", "trainer_state.json"

# Of an adapter's config, what says in words where the adapter lies; the modules that it took tell better
_PLACES = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"}
# and what says beside that where it came from or how it began
NOT_THE_ADAPTER = _PLACES | {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config", "megatron_core",
    "tokenizer_name_or_path", "tokenizer_kwargs", "runtime_config",
}  # fmt: skip


def is_hub_id(name: str | None) -> bool:
    """Tell whether the name reads as a hub id and is no local file or folder."""
    return bool(name) and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def base_name(name: str | None) -> str | None:
    """Tell what to call a base model given as a name or path: a hub id, an `embedded:` name, or None for a local
    one.
    """
    return embedded_name(name) or (name if is_hub_id(name) else None)


def adapter_config(model):
    """Return the PEFT config of a model's own adapter; None where it has none."""
    configs = getattr(model, "peft_config", None)
    return configs.get("default", next(iter(configs.values()))) if configs else None


def changed_settings(adapter) -> dict[str, object]:
    """Return the settings of a PEFT config that change the model and are not at PEFT's default, by name."""
    # the package loads TRL
    from posttrain.config.setting import defaults_of

    kind = next(kind for kind in type(adapter).__mro__ if kind.__module__.split(".")[0] == "peft")
    defaults = defaults_of(kind)
    told = {name: value for name, value in adapter.to_dict().items() if name in _PLACES or name not in NOT_THE_ADAPTER}
    return {name: value for name, value in told.items() if value != defaults.get(name)}


def loaded_from(model) -> str | None:
    """Return the name or path that a model, or the base under its adapter, was loaded from."""
    if isinstance(model, str):
        return model
    adapter = adapter_config(model)
    name = (adapter.base_model_name_or_path if adapter else None) or getattr(model.config, "_name_or_path", None)
    return name or None


def hub_base(given: str | None, name: str | None, setting: str = "base_model_id") -> str:
    """Return the hub id of the base model: the one that was given, or `name` where that is one.

    Raises:
        ConfigError: neither is a hub id.
    """
    if given is not None:
        return check_repo_id(setting, given)
    known = base_name(name)
    if known is None or known.startswith("embedded:"):
        base = known or (f"the local folder {name}" if name else "a model without a name")
        raise ConfigError(
            f"{setting} is not set, and the base model is {base}, which the hub does not know under that name. Set "
            f"{setting} to the hub's id of the model that it is, or was made from: ORG/NAME."
        )
    return known


def noted_base(folder: str | Path) -> tuple[str | None, str | None]:
    """Tell what a saved run says of its base model: the `base_model_id` it was given, and the name it was loaded from.

    Raises:
        DataError: its settings or its adapter's config cannot be read.
    """
    folder = Path(folder).resolve()
    run = run_of(folder)
    settings, adapter, card = run / "resolved_config.yaml", folder / "adapter_config.json", run / "README.md"
    given = name = None
    if settings.is_file():
        training = read_yaml(settings).get("training")
        given = training.get("base_model_id") if isinstance(training, dict) else None
    if adapter.is_file():
        name = read_json(adapter).get("base_model_name_or_path")
    elif card.is_file():
        name = read_metadata(card).get("base_model")
    return tuple(value if isinstance(value, str) and value else None for value in (given, name))


def run_of(folder: str | Path) -> Path:
    """Return the run that a folder belongs to: itself, or the one around a checkpoint.

    A folder named `checkpoint-N` is one where it holds a trainer's state, or our marker, and the folder around it is
    noted as a run: the marker's run, where there is a marker. Any other stands alone, and nothing beside it is read.
    """
    from posttrain.mechanisms.base_digests import plain

    folder = Path(folder).resolve()
    if not _CHECKPOINT.fullmatch(folder.name):
        return folder
    run = folder.parent
    if (folder / _MARKER).is_file():
        own = _settings_in(folder / _MARKER)
        around = _settings_in(run / _NOTE) if (run / _NOTE).is_file() else _settings_resolved(run)
        shared = own.keys() & around.keys()
        return run if shared and all(plain(own[name]) == plain(around[name]) for name in shared) else folder
    noted = _settings_in(run / _NOTE) if (run / _NOTE).is_file() else _settings_resolved(run)
    return run if noted and (folder / _STATE).is_file() else folder


def _settings_in(note: Path) -> dict:
    """Read the identity and update settings in a marker or a note; none where it is damaged."""
    try:
        content = read_json(note)
        return content["identity"] | content.get("update", {})
    except (DataError, KeyError, TypeError):
        return {}


def _settings_resolved(run: Path) -> dict:
    """Return the training settings in the resolved settings of a run of ours.

    None in anyone else's file of that name.
    """
    try:
        content = read_yaml(run / "resolved_config.yaml")
        ours = "output_dir" in content["training"] and "posttrain" in content["versions"] and "processes" in content
        return dict(content["training"]) if ours else {}
    # a file that is damaged is a DataError, which is a ValueError
    except (ValueError, KeyError, TypeError):
        return {}


def check_repo_id(setting: str, name: str) -> str:
    """Return `name`; ConfigError unless it may be the id of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ConfigError(
            f"{setting} is {name!r}, which is no name of a repository on the hub. It must be NAME or OWNER/NAME, of "
            "letters, digits, `-`, `_` and `.`, at most 96 of them, beginning and ending with a letter, a digit or "
            "`_`, without `--` or `..`."
        ) from None
    return name


def base_license(name: str | None) -> dict[str, str]:
    """Return the license fields of a base model's own card, as far as they can be known without the hub; else empty."""
    if base_name(name) == SMOLLM2:
        return {"license": "apache-2.0"}
    if not name or base_name(name) == TINY:
        return {}
    card = Path(name) / "README.md"
    if is_hub_id(name):
        from huggingface_hub import try_to_load_from_cache

        card = try_to_load_from_cache(name, "README.md")
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return {}
    return license_fields(read_metadata(Path(card)))
