"""The tokenizer or processor of a model: loading it, and what it and its chat template say of themselves."""

import contextlib
from pathlib import Path

from posttrain.data.rendering import bounds
from posttrain.errors import ConfigError, DataError, PosttrainError
from posttrain.model_sizes import check_if_there
from posttrain.remote import check_model_name, model_failure, reads_as_path
from posttrain.saved import check_tokenizer_files
from posttrain.visible import one_line


def load_processing_class(model: str, revision: str | None = None, trust_remote_code: bool = False):
    """Return the tokenizer (or processor) of a model: a hub id or a local folder.

    Raises ConfigError where there is none, EnvironmentIssue where the hub would have to be asked and cannot be reached.
    """
    from transformers import AutoProcessor

    check_model_name(model)
    check_if_there(model, revision)
    _check_template_files(model)
    try:
        return AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        check_tokenizer_files(Path(model))
        raise model_failure(model, error, "has no tokenizer that can be loaded", of_tokenizer=True) from error
    # files of a tokenizer are read in Rust and in Python, and neither checks their form
    except (AttributeError, IndexError, KeyError, TypeError, RecursionError, MemoryError) as error:
        check_tokenizer_files(Path(model))
        raise DataError(
            f"the tokenizer of {model} cannot be read: {type(error).__name__}: {one_line(error)}. One of its files is "
            "damaged."
        ) from error


def _check_template_files(model: str) -> None:
    folder = Path(model)
    if not folder.is_dir():
        return
    for pattern in ("chat_template*", "additional_chat_templates/*", "tokenizer_config.json"):
        for path in folder.glob(pattern):
            if path.is_file() and path.stat().st_size > bounds.LONGEST_TEMPLATE:
                raise DataError(f"{path} has more than {bounds.LONGEST_TEMPLATE >> 20} MiB, and is no chat template.")


def processing_class_for(model, processing_class, args):
    """Return the tokenizer or processor of a run with the training arguments `args`: the one given, else the model's
    own.

    `model`: a hub id or folder, or a model. Raises as `load_processing_class`, and ConfigError for a model without a
    name.
    """
    if processing_class is not None:
        _check_own_settings(processing_class, args)
        return processing_class
    model_id = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not model_id:
        raise ConfigError("the model has no name to load a tokenizer by; pass `processing_class`.")
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    revision = kwargs.get("revision") if isinstance(model, str) else None
    processing_class = load_processing_class(model_id, revision, args.trust_remote_code)
    _check_own_settings(processing_class, args)
    return processing_class


def _check_own_settings(processing_class, args) -> None:
    """Refuse an `eos_token` or `pad_token` that the tokenizer has not, and a `chat_template_path` without a template.

    A family without one of them has no such setting.
    """
    path, known = getattr(args, "chat_template_path", None), tokenizer_of(processing_class).get_vocab()
    if path is not None:
        _check_template_path(path)
    # a template's tokenizer brings tokens along
    for name in ("eos_token", "pad_token") if path is None else ("eos_token",):
        token = getattr(args, name, None)
        if token is not None and token not in known:
            raise ConfigError(
                f"{name} is {token!r}, which is no token of the model's tokenizer. Give one that it has, or leave it "
                "out."
            )


def _check_template_path(name: str) -> None:
    path, said = Path(name), f"chat_template_path is {name!r}"
    if path.is_file() and path.suffix in (".jinja", ".j2"):
        try:
            path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{said}, which cannot be read: {one_line(error)}.") from error
        return
    remedy = "Give a .jinja file, or the folder or hub id of a model whose tokenizer has a chat template."
    if path.is_file() or (reads_as_path(name) and not path.is_dir()):
        raise ConfigError(f"{said}, which is no folder and no .jinja file. {remedy}")
    try:
        tokenizer_of(load_processing_class(name)).get_chat_template()
    except PosttrainError as error:
        raise type(error)(f"{said}: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{said}, whose tokenizer has no chat template. {remedy}") from error


def tokenizer_of(processing_class):
    """Return the tokenizer in a processor; a tokenizer as it is."""
    from transformers import ProcessorMixin

    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def generation_config(model, revision: str | None = None):
    """Return the generation config of a model, or None.

    `model`: a hub id or folder, of which the weights are not read, or a model.
    """
    from transformers import GenerationConfig

    if not isinstance(model, str):
        return getattr(model, "generation_config", None)
    try:
        return GenerationConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError):
        return None


def generation_stop_ids(model, revision: str | None = None) -> set[int]:
    """Return the token ids at which a model's generation stops; empty where it does not say.

    `model`: a hub id or folder, of which the weights are not read, or a model.
    """
    from transformers import AutoConfig

    config = generation_config(model, revision)
    if config is None and isinstance(model, str):
        # a model without one generates by its own config
        try:
            config = AutoConfig.from_pretrained(model, revision=revision).get_text_config()
        except (OSError, ValueError):
            return set()
    ids = getattr(config, "eos_token_id", None)
    return set(ids) if isinstance(ids, list) else {ids} - {None}


def template_facts(processing_class) -> dict[str, bool | None]:
    """Tell what TRL's checks say of a chat template; None where there is none, or it cannot be asked.

    `prefix_preserving`: earlier messages are rendered alike whatever follows. `stop_token_trained`: of a whole
    conversation, training on the assistant's tokens takes in the end of the turn (asked of templates that mark them).
    """
    from trl.chat_template_utils import (
        has_generation_markers,
        is_chat_template_prefix_preserving,
        is_chat_template_stop_token_trained,
    )

    facts: dict[str, bool | None] = {"prefix_preserving": None, "stop_token_trained": None}
    template = getattr(processing_class, "chat_template", None)
    if template:
        # the check renders a tool call, which some templates refuse with an error of their own
        with contextlib.suppress(Exception):
            facts["prefix_preserving"] = is_chat_template_prefix_preserving(processing_class)
        if has_generation_markers(template):
            facts["stop_token_trained"] = is_chat_template_stop_token_trained(processing_class)
    return facts
