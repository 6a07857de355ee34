"""Secrets: which names and texts hold one, and settings and messages without them.

One list of names and one of forms, for whatever is written, shown or pickled. Standard library only.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from urllib.parse import quote

from posttrain.secret_forms import HIDDEN, hide_forms
from posttrain.secret_names import is_secret_name

_NAME = r"[A-Za-z_][\w.-]*"
_LITERAL = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
# after names in texts: of objects, flags, assignments, headers, and our own sentences
_QUOTED = re.compile(
    rf"(\\?[\"'])({_NAME})\1(\s*[:=]\s*)"
    rf"({_LITERAL}|\\\".*?\\\"|\\'.*?\\'|\{{[^{{}}]*\}}|\[[^\[\]]*\]|[^\s,}}\](){{\['\"\\]+)"
)
_FLAG = re.compile(
    rf"(?<![\w-])(--{_NAME})(=|:(?=\S)|\s+)({_LITERAL}|<[A-Za-z _-]{{1,40}}>|[^\s'\"`-][^\s`]*|-[^-\s`][^\s`]*)"
)
_ASSIGNED = re.compile(rf"(?<![\w?&;#.-])({_NAME})(\s?=(?![=>])\s?)({_LITERAL}|[^\s,;)\]}}'\"`]+)")
_SAID = re.compile(rf"(?<![\w.-])({_NAME})( is | was )({_LITERAL})")
_WRITTEN = re.compile(rf"([`{{,]\s*|^\s*(?:- )?)({_NAME})(:\s+)({_LITERAL}|[^\s,}}`]+)", re.MULTILINE)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|x-(?:api|auth|access)-(?:key|token)|(?:set-)?cookie)(\s*:\s*)(?!['\"])([^\r\n'\",}]+)",
    re.IGNORECASE,
)
# without quotes or at any place of a line, where the value looks like none of a sentence
_IN_PROSE = re.compile(
    rf"(?<![\w.-])({_NAME})(:[ \t]+| is | was )(?!\S*(?:[(\[:]|\.(?:ya?ml|jsonl?|py|md|txt|safetensors)\b))"
    r"(?=[^\s,;]*\d)(?=[^\s,;]*[A-Za-z])([^\s,;)\]}'\"`]{8,})"
)
# and where such a value stands behind a word that names a secret, with or without a sign: password hunter2 was refused
_VALUE_SIGNS = (
    r"(?=\S{0,200}(?:\d|[!@#$%^&*+=~]\w))(?!\S{0,200}(?:[(\[:|<]|\.(?:ya?ml|jsonl?|py|md|txt|safetensors)\b))"
)
_POINTED = re.compile(
    rf"(?<![\w.-])({_NAME})(\s?(?:==|=>|->|:=)\s?|:(?=['\"]))({_LITERAL}|{_VALUE_SIGNS}[^\s,;)\]}}'\"`]{{6,}})"
)
_BEHIND_WORD = re.compile(
    r"(?<![\w.<-])((?:pass(?:word|wd|phrase|code)|pwd|pw|credential|(?:api|access|secret|private|auth|account|license"
    r"|encryption|signing|ssh)[ _-]key|(?:(?:api|access|auth|hub|refresh|session)[ _-])?(?:token|secret)))"
    rf"([ \t]+|[ \t]+(?:is|was|of|=)[ \t]+|:[ \t]*)(?!is\b|was\b|of\b)(['\"]?){_VALUE_SIGNS}([^\s,;)\]}}'\"`]{{6,}})",
    re.IGNORECASE,
)
_NETRC = re.compile(r"\b(login\s+\S+\s+password\s+)\S+")
_TAGGED = re.compile(rf"<({_NAME})((?:\s[^<>]{{0,200}})?>\s*)([^<>\s][^<>]{{0,2000}}?)(\s*</\1>)")
_PLACE = re.compile(r"\S*:\d+\)?|command|\*\*\*.*")
# settings of a reward of one's own, which may be anything
_REWARD = re.compile(r"(?<![\w/.])((?!generated:|gym:|embedded:)[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)\?([^\s'\"`]+)")
_WHOLE_REWARD = re.compile(rf"{_REWARD.pattern.partition('?([^')[0][:-1]}\?(.*)", re.DOTALL)
_HARMLESS = re.compile(r"[+-]?[\d.]{1,11}(?:[eE][+-]?\d{1,3})?|true|false|null|none", re.IGNORECASE)

# What code and examples have in a secret's place: variables, and the name of what is to be filled in
_STANDS_FOR = re.compile(r"\$\{?[A-Z_][A-Z0-9_]*\}?|<[A-Za-z _-]{1,40}>|os\.(?:environ|getenv).*|\w{0,12}\.\.\.")
# A name alone, or a flag
_WHOLE_NAME = re.compile(r"-{0,2}[A-Za-z_][\w.-]{0,80}")
_LOOKS = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{8,}", re.DOTALL)
_VALUE = ("value", "val", "values")
_HELD = (*_VALUE, "default")
# Words of messages, which a value that is one of them does not take out of all texts
_COMMON = frozenset(
    """
    accuracy adapters anonymous answered baseline changeme channels checkpoint checkpoints complete completed
    completion completions configuration container contains continue database datasets defaults developer development
    disabled document documents evaluate evaluation examples external finished function generate generated generation
    gradient gradients huggingface internal language learning localhost location messages metadata multiple notebook
    optimizer original password pipeline policies positive postgres posttrain practice precision preference
    preferences prepared processed production programs projects provided reference repository required research
    response responses resulting resuming sampling schedule scheduler security sequence sequences services settings
    something standard template templates terminal together tokenizer tokenizers trainable training transformer
    transformers username variable variables verified warnings workspace yourself
    """.split()
)

# names of tables as often as of secrets, and what a secret among them looks like
_TABLES = ("tokens", "keys")
_LONG = re.compile(r"(?=(?:.*\d){2})(?=.*[A-Za-z])[\w+=-]{12,}")

_remembered: set[str] = set()


def hide(text: str) -> str:
    """Return a text with every secret as `***`: by its form, by the name before it, and those that are known.

    Known are the values of secret names in the settings that `remember` was given, and in the environment.
    """
    return _hide(text, _known())


def _hide(text: str, secrets: list[str]) -> str:
    # first, while they are whole
    for known in secrets:
        if known in text:
            text = text.replace(known, f"hf_{HIDDEN}" if known.startswith("hf_") else HIDDEN)
    text = hide_forms(_REWARD.sub(_hide_reward, text) if "?" in text else text)
    if ":" in text:
        text = _HEADER.sub(rf"\1\2{HIDDEN}", text)
    if "</" in text:
        text = _TAGGED.sub(_hide_tagged, text)
    text = _hide_quoted(text)
    for sign, pattern in (("--", _FLAG), ("", _POINTED), ("=", _ASSIGNED), (" ", _SAID), (" ", _IN_PROSE)):
        if sign in text:
            text = pattern.sub(_hide_said, text)
    text = _NETRC.sub(rf"\1{HIDDEN}", _BEHIND_WORD.sub(_hide_behind_word, text))
    return _WRITTEN.sub(_hide_written, text) if ":" in text else text


def hide_words(words: Iterable[str]) -> list[str]:
    """Return the words of a command line with every secret as `***`: after `--hub_token`, in JSON, by its form."""
    shown, hidden = [], False
    for word in words:
        name, sign, value = word.partition("=")
        if word.startswith("--"):
            hidden = is_secret_name(name)
            if not sign:
                shown.append(hide(word))
            else:
                shown.append(f"{hide(name)}={HIDDEN if hidden else _hide_word(value)}")
                hidden = False
        else:
            shown.append(HIDDEN if hidden else _hide_word(word))
    return shown


def without_secrets(value, instead: str | None = None):
    """Return settings without secrets: mappings without entries of secret names, texts without secret parts.

    Args:
        value: of any kind, nested as it likes; objects of other kinds than mappings, lists, tuples, sets, texts, bytes
            and paths stay as they are.
        instead: stands in the place of an entry's value; default: the entry is left out.
    """
    return _without(value, instead, _known())


def _without(value, instead, secrets: list[str]):
    if isinstance(value, Mapping):
        return _mapping(value, instead, secrets)
    if isinstance(value, list | tuple):
        made = _sequence(value, instead, secrets)
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, set | frozenset):
        return type(value)(_without(item, instead, secrets) for item in value)
    if isinstance(value, str):
        whole = _WHOLE_REWARD.fullmatch(value)
        text = _hide_reward(whole) if whole else _hide(value, secrets).replace(f"hf_{HIDDEN}", HIDDEN)
        return value if text == value else text
    if isinstance(value, bytes | bytearray):
        text = value.decode("latin-1")
        shown = _hide(text, secrets)
        return value if shown == text else type(value)(shown.encode("latin-1"))
    if isinstance(value, PurePath):
        text = _without(str(value), None, secrets)
        return value if text == str(value) else type(value)(text)
    return value


def remember(value, is_secret: bool = False) -> None:
    """Have `hide` know the values of secret names in settings, so that no message shows them, whoever writes it."""
    if isinstance(value, Mapping):
        named = _names_a_secret(value)
        for name, item in value.items():
            text = _text(name).lower()
            holds = named if text in _HELD else is_secret_name(_text(name)) and not (named and text == "key")
            holds |= text in _TABLES and _are_secrets(item)
            remember(item, is_secret or holds)
    elif isinstance(value, list | tuple):
        for item, before in zip(value, [None, *value], strict=False):
            remember(item, is_secret or _belongs(item, before, len(value)))
    elif isinstance(value, set | frozenset):
        for item in value:
            remember(item, is_secret)
    elif is_secret and isinstance(value, int | bytes):
        remember(str(value) if isinstance(value, int) else _text(value), is_secret)
    elif isinstance(value, str):
        whole = _WHOLE_REWARD.fullmatch(value)
        if is_secret:
            _remembered.add(value)
        elif whole:
            for part in whole[2].split("&"):
                name, _, text = part.partition("=")
                remember(text, is_secret_name(name))


def _mapping(value: Mapping, instead, secrets: list[str]):
    named, has_value = _names_a_secret(value), any(_text(name).lower() in _VALUE for name in value)
    kept = {}
    for name, item in value.items():
        text = _text(name).lower()
        # the key of a key and its value; and that of a module or a table, with a number
        is_key = text == "key" and (has_value or isinstance(item, int | float))
        is_value = named and text in _HELD and not (isinstance(item, int | float) and abs(item) < 10_000)
        hides = (is_secret_name(_text(name)) and not is_key) or is_value or (text in _TABLES and _are_secrets(item))
        shown = _without(name, None, secrets) if isinstance(name, str | bytes) else name
        if not hides or item is None or isinstance(item, bool):
            kept[shown] = _without(item, instead, secrets)
        elif instead is not None:
            kept[shown] = instead
    if isinstance(value, dict) and type(value) is not dict:
        try:
            made = value.copy()
            made.clear()
            made.update(kept)
            return made
        except (AttributeError, TypeError):
            return kept
    return kept


def _sequence(items, instead, secrets: list[str]) -> list:
    """Hide what follows a secret's name: in a pair, behind a flag, or where it looks like one."""
    made = []
    for item, before in zip(items, [None, *items], strict=False):
        if _belongs(item, before, len(items)):
            made.append(HIDDEN)
        elif isinstance(item, str) and item.startswith("--") and "=" in item:
            name, _, value = item.partition("=")
            shown = HIDDEN if is_secret_name(name) else _without(value, None, secrets)
            made.append(f"{_hide(name, secrets)}={shown}")
        else:
            made.append(_without(item, instead, secrets))
    return made


def _belongs(item, before, length: int) -> bool:
    """Tell whether an item of a list of `length` items is the value of the secret that the item before it names."""
    name = _text(before)
    if not _WHOLE_NAME.fullmatch(name) or not is_secret_name(name) or item is None or isinstance(item, bool):
        return False
    if name.startswith("-"):
        return not _text(item).startswith("--") and not isinstance(item, int | float)
    if name.lower() == "key" or isinstance(item, int | float):
        return False
    # `pw` or `pat` beside a name of its kind is no secret's
    if length == 2 and (len(name) > 3 or _LOOKS.fullmatch(_text(item))):
        return isinstance(item, str | bytes | list | tuple | Mapping)
    return bool(_LOOKS.fullmatch(_text(item)))


def _are_secrets(value) -> bool:
    # of an object the values by their names: tokens: {hf: ...}
    items = [*value.values()] if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
    return bool(items) and all(_LONG.fullmatch(_text(item)) for item in items)


def _names_a_secret(value: Mapping) -> bool:
    """Tell whether an object of a name and a value is one of a secret: {"name": "Authorization", "value": ...}."""
    return any(
        is_secret_name(_text(item))
        for name, item in value.items()
        if _text(name).lower() in ("name", "key", "header", "variable")
    ) and any(_text(name).lower() in _HELD for name in value)


def _text(value) -> str:
    return value if isinstance(value, str) else value.decode("latin-1") if isinstance(value, bytes) else ""


def _hide_word(word: str) -> str:
    if word.lstrip()[:1] in ("{", "["):
        try:
            content = json.loads(word)
        except (ValueError, RecursionError):
            return hide(word)
        clean = without_secrets(content, HIDDEN)
        return word if clean == content else json.dumps(clean, ensure_ascii=False)
    whole = _WHOLE_REWARD.fullmatch(word)
    return _hide_reward(whole) if whole else hide(word)


def _hide_reward(match: re.Match) -> str:
    """Hide the texts among the settings of a reward of one's own; numbers stay."""
    shown = []
    for part in match[2].split("&"):
        name, sign, value = part.partition("=")
        keeps = not sign or (_HARMLESS.fullmatch(value) and not is_secret_name(name))
        shown.append(part if keeps else f"{name}={HIDDEN}")
    return f"{match[1]}?{'&'.join(shown)}"


def _hide_written(match: re.Match) -> str:
    before, name, sign, value = match.groups()
    if name == "key" or _PLACE.fullmatch(value) or not _hides(name, value):
        return match[0]
    return f"{before}{name}{sign}{_in_quotes(value)}"


def _hide_said(match: re.Match) -> str:
    name, sign, value = match.groups()
    # what stands behind the bare word `key` is as often the name of a setting, or `value`
    if name.lstrip("-") == "key" or not _hides(name, value):
        return match[0]
    return f"{name}{sign}{_in_quotes(value)}"


def _hide_behind_word(match: re.Match) -> str:
    name, sign, quote, value = match.groups()
    # a token may be one of a vocabulary, and as short as a word
    looks = _LONG.fullmatch(value) if name.lower() == "token" else not _HARMLESS.fullmatch(value)
    return f"{name}{sign}{quote}{HIDDEN}" if looks and _hides("password", value) else match[0]


def _hide_tagged(match: re.Match) -> str:
    name, begin, value, end = match.groups()
    if not _hides(name, value) or (name.lower() in ("key", "token") and not _LOOKS.fullmatch(value)):
        return match[0]
    return f"<{name}{begin}{HIDDEN}{end}"


def _hide_quoted(text: str) -> str:
    def shown(match: re.Match) -> str:
        quote, name, sign, value = match.groups()
        value = _in_quotes(value) if _hides(name, value) else _hide_quoted(value) if value[0] in "[{" else value
        return f"{quote}{name}{quote}{sign}{value}"

    return _QUOTED.sub(shown, text)


def _hides(name: str, value: str) -> bool:
    plain = value.strip("\\\"'")
    return (
        is_secret_name(name)
        and plain not in ("", "None", "null", "True", "False", "true", "false", "str", HIDDEN, name)
        and not _STANDS_FOR.fullmatch(plain)
    )


def _in_quotes(literal: str) -> str:
    quote = re.match(r"\\?[\"']|", literal)[0]
    return f"{quote}{HIDDEN}{quote}"


def _known() -> list[str]:
    """Return the values that are known, longest first."""
    names = (name for name in tuple(os.environ) if name not in ("PWD", "OLDPWD") and is_secret_name(name))
    values = _remembered.union(os.environ.get(name, "") for name in names)
    return sorted({shape for value in values for shape in _shapes(value)}, key=len, reverse=True)


@functools.lru_cache(maxsize=256)
def _shapes(value: str) -> tuple[str, ...]:
    """Return a value as it is quoted: as it is, in JSON, in a URL; none where other texts hold it as well."""
    if len(value) < 8 or value in _COMMON or (value.startswith("/") and os.path.exists(value)):
        return ()
    return value, json.dumps(value)[1:-1], quote(value, safe="")
