"""Configs of models, tokenizers and adapters without secrets, their tokens of a vocabulary as they are."""

import re
from dataclasses import dataclass

from posttrain.private import without_secrets
from posttrain.secret_names import is_secret_name

# what a token of a vocabulary looks like whose name could be that of a secret, such as user_token
_TOKEN = re.compile(r"[<\[{|｜].*[>\]}|｜]|\W{1,5}", re.DOTALL)
_PARTS_OF_A_TOKEN = {"__type", "content", "id", "lstrip", "normalized", "rstrip", "single_word", "special"}


def config_without_secrets(config: dict) -> dict:
    """Return the content of a config's JSON file without secrets, by name and by form, at any depth.

    Tokens of a vocabulary, chat templates and small numbers stay as they are, whatever their names.
    """
    return _put_back(without_secrets(_set_aside(config)))


@dataclass(frozen=True, eq=False)
class _Entry:
    """An entry of a config that stays as it is, whatever its name."""

    name: str
    value: object


def _set_aside(value):
    """Return a config with the tokens of a vocabulary, templates and small numbers out of reach."""
    if isinstance(value, dict):
        return dict(
            (_Entry(name, item), None) if _stays(name, item) else (name, _set_aside(item))
            for name, item in value.items()
        )
    return [_set_aside(item) for item in value] if isinstance(value, list) else value


def _put_back(value):
    if isinstance(value, dict):
        return dict(
            (name.name, name.value) if isinstance(name, _Entry) else (name, _put_back(item))
            for name, item in value.items()
        )
    return [_put_back(item) for item in value] if isinstance(value, list) else value


def _stays(name: str, item) -> bool:
    """Tell whether an entry of a config holds no secret: a label's number, a template, a token of a vocabulary."""
    if isinstance(item, int | float):
        return abs(item) < 10_000
    if name == "chat_template":
        return isinstance(item, str | list)
    if name == "added_tokens_decoder":
        return isinstance(item, dict) and all(_is_token(token) for token in item.values())
    if name.endswith("special_tokens") and isinstance(item, list):
        return all(isinstance(token, str) or _is_token(token) for token in item)
    if not name.endswith("_token"):
        return False
    return _is_token(item) or (isinstance(item, str) and (not is_secret_name(name) or bool(_TOKEN.fullmatch(item))))


def _is_token(item) -> bool:
    return isinstance(item, dict) and "content" in item and item.keys() <= _PARTS_OF_A_TOKEN
