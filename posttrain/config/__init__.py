"""Settings from a YAML file and the command line: TRL's parser, with errors that say what to write.

    data_args, model_args, training_args = parse((DataArguments, ModelArguments, RobustDPOConfig))

`--config FILE` names the YAML file, whose keys are the fields of the dataclasses; the command line wins over
it: also where a setting of the file cannot stand beside one of the command line, which is said. A mapping
`env:` in the file sets environment variables that no program is run by; those that a library reads while it is imported
have to be set in the shell instead. What runs code of others is for the command line alone.
"""

import copy
import functools
import os
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import fields

import yaml
from trl import ModelConfig, TrlParser
from trl import get_peft_config as _get_peft_config
from trl import get_quantization_config as get_quantization_config

from posttrain import former_names, patterns, private, yaml_text
from posttrain.checks import near
from posttrain.config import strangers
from posttrain.config.arguments import DataArguments as DataArguments
from posttrain.config.arguments import ModelArguments as ModelArguments
from posttrain.config.arguments import is_local as is_local
from posttrain.config.field_types import BadValue, FieldType, kind_of, shown
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.log import get_logger
from posttrain.visible import one_line

COMMAND_LINE = "command line"

# What to write for settings that transformers or TRL no longer have. `{value}` is what the user gave.
REMOVED = {
    "warmup_ratio": "write `warmup_steps: {value}` (below 1 it is a share of all steps)",
    "evaluation_strategy": "write `eval_strategy: {value}`",
    "max_seq_length": "write `max_length: {value}`",
    "max_prompt_length": "leave it out; `max_length` cuts prompt and completion together",
    "max_completion_length": "leave it out; `max_length` cuts prompt and completion together",
    "group_by_length": "write `train_sampling_strategy: group_by_length`",
    "torch_dtype": "write `dtype: {value}`",
    "no_cuda": "write `use_cpu: {value}`",
    "per_gpu_train_batch_size": "write `per_device_train_batch_size: {value}`",
    "per_gpu_eval_batch_size": "write `per_device_eval_batch_size: {value}`",
    "push_to_hub_model_id": "write `hub_model_id: {value}`",
    "push_to_hub_organization": "write `hub_model_id: {value}/NAME`",
    "push_to_hub_token": "leave it out; log in with `hf auth login`, or set HF_TOKEN in the shell",
    "overwrite_output_dir": "write `overwrite: {value}`; `resume_from_checkpoint` continues an earlier run",
    "logging_dir": "leave it out; TENSORBOARD_LOGGING_DIR in the shell sets TensorBoard's folder",
    "save_safetensors": "leave it out; weights are always saved as safetensors",
    "more_datasets": "write `datasets:`, a list with an entry `- path: FILE` for each of them and for that of "
    "`dataset_name`, which is left out then",
    "tokenizer": "leave it out; the tokenizer comes with `model_name_or_path`",
    "tokenizer_name": "leave it out; the tokenizer comes with `model_name_or_path`",
    "tokenizer_name_or_path": "leave it out; the tokenizer comes with `model_name_or_path`",
}


def parse(dataclass_types: Iterable, argv: Sequence[str] | None = None) -> tuple:
    """Make one instance of each dataclass, from `argv` (default: the command line) and the YAML file it names.

    Of `Kind | None` it is None where nobody gave any of the class's settings.

    Raises ConfigError, with the file and line of the setting, for a file that cannot be read, an unknown,
    removed or repeated key, a value of the wrong type, and whatever a dataclass refuses in `__post_init__`.
    """
    return PosttrainParser(dataclass_types).parse_args_and_config(argv)


def get_peft_config(model_args: ModelConfig):
    """Return TRL's config of the adapter that the LoRA settings describe.

    None without `use_peft`. ConfigError where PEFT refuses, and for a pattern that may take for ever to match.
    """
    targets = model_args.lora_target_modules
    if isinstance(targets, str) and re.fullmatch(r"[\w.]+", targets):
        # TRL unpacks a list of one, and PEFT would match a text with the whole path of a module
        model_args = copy.copy(model_args)
        model_args.lora_target_modules = [targets]
    elif isinstance(targets, str):
        patterns.check(targets, "lora_target_modules")
    try:
        return _get_peft_config(model_args)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the adapter cannot be built with these settings: {error}") from error


def __getattr__(name: str):
    if name == "run_main":
        return former_names.held("posttrain.recipe.ending", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class PosttrainParser(TrlParser):
    """TRL's parser, answering bad settings with a ConfigError: nearest name, replacement, file and line."""

    def __init__(self, dataclass_types: Iterable, **kwargs):
        given = [typing.get_args(kind) or (kind,) for kind in dataclass_types]
        dataclass_types = [kinds[0] for kinds in given]
        self._nullable = {kinds[0] for kinds in given if type(None) in kinds}
        # An abbreviated flag would change its meaning when a field is added.
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self._sections = {f.name: k.__name__ for k in self.dataclass_types for f in fields(k) if f.init}
        self._places: dict[str, str] = {}
        self._types: dict[str, FieldType] = {}
        self._flags: set[str | None] = set()
        for kind in self.dataclass_types:
            for name, hint in typing.get_type_hints(kind).items():
                choices = kind.__dataclass_fields__[name].metadata.get("choices")
                self._types[name] = FieldType(name, hint, choices)
        for action in self._actions:
            if action.dest in self._sections and action.type is not None:
                action.type = functools.partial(self._read, action.dest)

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple:
        """Parse as `parse` does."""
        arguments, path = _split_config(sys.argv[1:] if args is None else list(args))
        self._places, self._flags = {}, set(map(_flag, arguments))
        if path is not None:
            self._read_defaults(path)
        try:
            values, unknown = self.parse_known_args(arguments)
        except BadValue as error:
            raise ConfigError(f"{COMMAND_LINE}: {error}") from None
        self._refuse_unknown(unknown)
        private.remember(vars(values))
        for name in filter(None, map(_flag, arguments)):
            self._places[name if name in self._sections else name.removeprefix("no_")] = COMMAND_LINE
            if name in self._types and hasattr(values, name):
                setattr(values, name, self._types[name].from_words(getattr(values, name)))
        if "allow_code" in self._sections:
            # given by nobody: settings name code, and none of it may run
            values.allow_code = values.allow_code or []
            self._places["allow_code"] = COMMAND_LINE
        return tuple(self._build(kind, values) for kind in self.dataclass_types)

    def _read(self, name: str, text: str):
        """Convert a word of the command line, or the file's text, which argparse hands over where no flag is given."""
        kind = self._types[name]
        return kind.from_word(text) if name in self._flags else kind.from_scalar(text)

    def error(self, message: str):
        """Raise what argparse has to say, as a ConfigError."""
        raise ConfigError(f"{COMMAND_LINE}: {message}")

    def _read_defaults(self, path: str) -> None:
        settings, lines = _read_yaml(path)
        private.remember(settings)
        for name, value in (settings.pop("env", None) or {}).items():
            place = f"{path}:{lines['env']}"
            strangers.check_variable(str(name), place)
            text = strangers.value_of_variable(str(name), value, place)
            try:
                os.environ[str(name)] = text
            except (OSError, ValueError) as error:
                raise ConfigError(f"{path}:{lines['env']}: `env` cannot set {str(name)!r}: {error}.") from None
        for name, value in settings.items():
            place = self._places[name] = f"{path}:{lines[name]}"
            if name not in self._sections:
                raise ConfigError(f"{place}: {self._unknown(name, value)}")
            strangers.check_setting(name, value, place)
            try:
                settings[name] = self._types[name].from_yaml(value)
            except BadValue as error:
                raise ConfigError(f"{place}: {error}") from None
        self.set_defaults_with_config(**settings)

    def _refuse_unknown(self, unknown: list[str]) -> None:
        if not unknown:
            return
        name, _, value = unknown[0].partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"{COMMAND_LINE}: `{name}` follows no key; write `--key value`.")
        if not value and len(unknown) > 1 and not unknown[1].startswith("--"):
            value = unknown[1]
        raise ConfigError(f"{COMMAND_LINE}: {self._unknown(_flag(name), value or True)}")

    def _unknown(self, name: str, value) -> str:
        for kind in self.dataclass_types:
            other = getattr(kind, "renamed", {}).get(name)
            if other is not None:
                return f"`{name}` is called `{other}`; write `{other}: {shown(value)}`."
            # the flag that sets a boolean to false
            other = getattr(kind, "renamed", {}).get(name.removeprefix("no_"))
            if other is not None:
                return f"`{name.removeprefix('no_')}` is called `{other}`; write `{other}: false`."
        if name in REMOVED:
            return f"`{name}` is not a setting any more: {REMOVED[name].format(value=shown(value))}."
        close = near(name, self._sections)
        if close:
            return f"unknown key `{name}`; did you mean `{close}` ({self._sections[close]})?"
        sections = ", ".join(kind.__name__ for kind in self.dataclass_types)
        return f"unknown key `{name}`; the keys are the fields of {sections} (--help lists them)."

    def _build(self, kind: type, values):
        # only what was written, so that the class can tell it from its own defaults
        written = [f.name for f in fields(kind) if f.init and f.name in self._places]
        if kind in self._nullable and not written:
            return None
        for name, others in getattr(kind, "replaces", {}).items():
            for other in others:
                self._leave_out({other: (name,)}, written, values)
        while True:
            try:
                return kind(**{name: getattr(values, name) for name in written})
            except ExcludedSetting as error:
                if not self._leave_out(error.yields, written, values):
                    raise self._placed(error) from error
            except ValueError as error:
                raise self._placed(error) from error

    def _leave_out(self, yields: dict[str, tuple[str, ...]], written: list[str], values) -> bool:
        """Tell whether a setting of the file could be left out of `written` for one of the command line; says so."""
        for name, by in yields.items():
            winners = [other for other in by if self._places.get(other) == COMMAND_LINE]
            if name in written and winners and self._places[name] != COMMAND_LINE:
                written.remove(name)
                get_logger().info(
                    "%s: `%s: %s` is left out, as the command line has --%s %s",
                    self._places[name],
                    name,
                    shown(getattr(values, name)),
                    winners[0],
                    _as_words(getattr(values, winners[0])),
                )
                return True
        return False

    def _placed(self, error: ValueError) -> ConfigError:
        """Return the error with the places of the settings that it names."""
        named = [name for name in self._places if re.search(rf"(?<!\w){name}(?!\w)", str(error))]
        places = ", ".join(f"{name}: {self._places[name]}" for name in named)
        return ConfigError(f"{error} ({places})" if places else str(error))


def _read_yaml(path: str) -> tuple[dict, dict[str, int]]:
    """Return the settings of a YAML file, and the line of each key."""
    try:
        text = yaml_text.read(path).decode("utf-8-sig")
        if not text.strip():
            raise ConfigError(f"the config file {path} is empty; write lines of `key: value`, or leave --config out.")
        loader, root = yaml_text.compose(text, _Loader)
        _check_keys(root, path)
        settings = None if root is None else loader.construct_document(root)
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: lists or mappings are nested too deeply.") from None
    if settings is None:
        return {}, {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}:1: a config file is lines of `key: value`, not {kind_of(settings)}.")
    # with the keys that `<<` merged in, which now stand before the mapping's own
    lines = {key.value: key.start_mark.line + 1 for key, _ in root.value}
    for key, _ in root.value:
        if not key.tag.endswith(":str"):
            raise ConfigError(
                f"{path}:{lines[key.value]}: the key `{one_line(key.value)}` is no text, as all keys are."
            )
        if one_line(key.value) != key.value:
            raise ConfigError(f"{path}:{lines[key.value]}: the key `{one_line(key.value)}` is the name of no setting.")
    if not isinstance(settings.get("env") or {}, dict):
        raise ConfigError(f"{path}:{lines['env']}: `env` is {kind_of(settings['env'])}; it takes a mapping.")
    return settings, lines


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the line of what its own constructors fail over, such as a date without such a day."""

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError) as error:
            what = f"a value cannot be read as {node.tag.rpartition(':')[2]} ({error})"
            raise yaml.constructor.ConstructorError(problem=what, problem_mark=node.start_mark) from None


def _check_keys(node, path: str, outer: tuple = ()) -> None:
    """Refuse what YAML takes without a word: of two equal keys it keeps the last, and an anchor may hold itself."""
    if any(node is other for other in outer):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: what the anchor names here contains itself.")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, path, (*outer, node))
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in first:
                raise ConfigError(f"{path}:{line}: `{one_line(key.value)}` is set at line {first[key.value]} already.")
            if isinstance(key, yaml.ScalarNode):
                first[key.value] = line
            _check_keys(value, path, (*outer, node))


def _split_config(arguments: list[str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--config FILE`, and FILE."""
    rest, path, stream = [], None, iter(arguments)
    for argument in stream:
        if _flag(argument) != "config":
            rest.append(argument)
            continue
        if path is not None:
            raise ConfigError(f"{COMMAND_LINE}: `--config` is given twice; keep one.")
        path = argument.partition("=")[2] or next(stream, None)
        if path is None or path.startswith("--"):
            raise ConfigError(f"{COMMAND_LINE}: `--config` needs the path of a YAML file.")
    return rest, path


def _as_words(value) -> str:
    """Write a value as the command line has it."""
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return " ".join(value) if texts else shown(value)


def _flag(argument: str) -> str | None:
    """Return `learning_rate` from `--learning-rate=1e-4`; None for what is no flag."""
    return argument[2:].partition("=")[0].replace("-", "_") if argument.startswith("--") else None
