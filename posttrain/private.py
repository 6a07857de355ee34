"""Secrets: which names and texts hold one, and settings and messages without them.

One list of names and one of forms, for whatever is written, shown or pickled. Standard library only.
"""

import functools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath

HIDDEN = "***"

# Words that make a name a secret's wherever they stand in it
_SECRET = {
    "secret", "secrets", "password", "passwords", "passwd", "passphrase", "passwort", "pwd", "credential",
    "credentials", "authorization", "authorisation", "bearer", "cookie", "cookies", "jwt", "apikey", "apikeys",
    "authtoken", "accesstoken", "webhook",
}  # fmt: skip
# ... where they are its last word
_SECRET_AT_END = {"auth", "signature", "sig", "pass", "dsn", "otp", "token", "key"}
# ... and of several, where one of these comes before
_PLURALS = {"tokens", "keys"}
_OF_SERVICES = {
    "access", "account", "api", "auth", "hf", "hub", "private", "refresh", "service", "session", "ssh", "user",
}  # fmt: skip
# What may stand behind the last word
_BEHIND = re.compile(r"\d+|value|string|str|text|prod|dev|test|live|b64|base64|pem|header|headers")
# Names that end so are of where something stands, or how much of it there is
_ABOUT = {
    "accuracy", "column", "columns", "count", "counts", "dir", "dtype", "field", "fields", "file", "files", "folder",
    "format", "id", "ids", "index", "kind", "length", "level", "mask", "mode", "name", "names", "path", "paths",
    "size", "type", "types",
}  # fmt: skip
# Tokens of a vocabulary, and keys of tables
_VOCABULARY = {
    "added", "additional", "answer", "assistant", "audio", "begin", "beginning", "boa", "boi", "bos", "call", "class",
    "cls", "completion", "content", "control", "decoder", "each", "encoder", "end", "eoa", "eoc", "eoi", "eos", "eot",
    "every", "extra", "fake", "first", "forced", "ignore", "image", "initial", "last", "mask", "max", "min", "new",
    "next", "num", "pad", "padding", "per", "placeholder", "prefix", "previous", "prompt", "reasoning", "response",
    "row", "sep", "separator", "single", "special", "start", "step", "stop", "suffix", "system", "think", "thinking",
    "tool", "turn", "unk", "unknown", "user", "video", "vision", "vocab", "word",
}  # fmt: skip
_TABLES = {
    "answer", "cache", "chosen", "column", "completion", "config", "data", "dataset", "dict", "feature", "foreign",
    "gold", "group", "image", "index", "input", "json", "label", "main", "message", "messages", "metric", "metrics",
    "order", "output", "partition", "primary", "prompt", "public", "question", "rejected", "response", "reward",
    "row", "score", "sort", "split", "state", "task", "text", "train", "value", "video",
}  # fmt: skip
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_RUN_TOGETHER = re.compile(
    r"passw|secret|credential|(?:access|api|auth|bearer|hf|hub|private|refresh|session)_?(?:token|key)s?$"
)
# which goes with a signature
_KEY_ID = re.compile(r"access_?key_?id|key_pair_id|google_?access_?id", re.IGNORECASE)

# Texts that are secrets by their form
_FORMS = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(?:-----END|\Z)"
    r"|\beyJ[\w-]{5,}\.[\w-]{2,}\.[\w-]*"
    r"|(?<![\w-])(?:sk|pk|rk)[-_](?=[\w-]{0,80}[0-9A-Z])[\w-]{8,}"
    r"|\b(?:gh[pousr]_|github_pat_|glpat-|xox[a-z]-|gsk_|nvapi-|dckr_pat_|npm_|pypi-AgE|dop_v1_|shpat_|r8_)[\w-]{8,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b|\bAIza[\w-]{20,}|\bya29\.[\w-]{8,}|\bSG\.[\w-]{8,}\.[\w-]{8,}"
    r"|(?<=hooks\.slack\.com/services/)[\w/]+|(?<=/api/webhooks/)[\w/-]+",
    re.DOTALL,
)
# a token of the hub as a word of its own; hf_pairs.jsonl and hf_org/name are names
_HUB_TOKEN = re.compile(r"(?<![\w./-])hf_[\w-]{4,}(?![\w-]|[./]\w)|(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}")
_BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=-]{4,}|\b(Token\s+)(?=[a-zA-Z_-]*\d)[\w.~+/=-]{8,}")
_USER_OF_URL = re.compile(r"(?<=://)[^/\s?#'\"]+@")

_NAME = r"[A-Za-z_][\w.-]*"
_LITERAL = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
# after names in texts: of queries and fragments, objects, flags, assignments, headers, and our own sentences
_QUERY = re.compile(rf"([?&;#])({_NAME})=([^&#\s'\"<>`]*)")
_QUOTED = re.compile(
    rf"(\\?[\"'])({_NAME})\1(\s*[:=]\s*)"
    rf"({_LITERAL}|\\\".*?\\\"|\\'.*?\\'|\{{[^{{}}]*\}}|\[[^\[\]]*\]|[^\s,}}\](){{\['\"\\]+)"
)
_FLAG = re.compile(rf"(?<![\w-])--({_NAME})(=|\s+)({_LITERAL}|[^\s'\"-][^\s]*|-[^-\s][^\s]*)")
_ASSIGNED = re.compile(rf"(?<![\w?&;#.-])({_NAME})(\s?=\s?)({_LITERAL}|[^\s,;)\]}}'\"`]+)")
_SAID = re.compile(rf"(?<![\w-])({_NAME})( is | was )({_LITERAL})")
_WRITTEN = re.compile(rf"([`{{,]\s*|^\s*(?:- )?)({_NAME})(:\s+)({_LITERAL}|[^\s,}}`]+)", re.MULTILINE)
_HEADER = re.compile(
    r"\b((?:proxy-)?authorization|x-(?:api|auth|access)-(?:key|token)|(?:set-)?cookie)(\s*:\s*)(?!['\"])([^\r\n'\",}]+)",
    re.IGNORECASE,
)
_PLACE = re.compile(r"\S*:\d+\)?|command|\*\*\*.*")
# settings of a reward of one's own, which may be anything
_REWARD = re.compile(r"(?<![\w/.])((?!generated:|gym:|embedded:)[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)\?([^\s'\"`]+)")
_WHOLE_REWARD = re.compile(rf"{_REWARD.pattern.partition('?([^')[0][:-1]}\?(.*)", re.DOTALL)
_HARMLESS = re.compile(r"[+-]?[\d.]{1,11}(?:[eE][+-]?\d{1,3})?|true|false|null|none", re.IGNORECASE)

_remembered: set[str] = set()


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Tell whether a setting, header, variable or query value of this name is a secret: hub_token, apiKey, X-Signature.

    Tokens of a vocabulary (pad_token, max_tokens), keys of tables (sort_key) and what tells where something stands
    (key_column) are none.
    """
    words = [word.lower() for word in _PARTS.findall(name)][-12:]
    if _KEY_ID.search(name.replace("-", "_")):
        return True
    while len(words) > 1 and _BEHIND.fullmatch(words[-1]):
        words.pop()
    if not words or words[-1] in _ABOUT:
        return False
    if _SECRET.intersection(words) or _RUN_TOGETHER.search("_".join(words)) or _RUN_TOGETHER.search(name.lower()):
        return True
    *before, last = words
    if last in _PLURALS:
        return bool(before) and before[-1] in _OF_SERVICES
    if last not in _SECRET_AT_END:
        return False
    if last == "token":
        return not _VOCABULARY.intersection(before)
    if last == "key":
        return not before or before[-1] not in _TABLES
    return last != "pass" or not before or before[-1] not in {"forward", "backward", "per", "first", "last", "second"}


def hide_forms(text: str) -> str:
    """Return a text with what is a secret by its form hidden: tokens of services, JWTs, private keys, users of URLs."""
    text = _FORMS.sub(HIDDEN, text)
    text = _USER_OF_URL.sub(f"{HIDDEN}@", _HUB_TOKEN.sub(f"hf_{HIDDEN}", text))
    return _QUERY.sub(_hide_query, _BEARER.sub(lambda m: f"{m[1] or m[2]}{HIDDEN}", text))


def hide(text: str) -> str:
    """Return a text with every secret as `***`: by its form, by the name before it, and those that are known.

    Known are the values of secret names in the settings that `remember` was given, and in the environment.
    """
    text = hide_forms(_REWARD.sub(_hide_reward, text))
    for known in _known():
        if known in text:
            text = text.replace(known, HIDDEN)
    text = _HEADER.sub(rf"\1\2{HIDDEN}", text)
    # what stands behind the bare word `key` is as often the name of a setting, or `value`
    text = _FLAG.sub(
        lambda m: f"--{m[1]}{m[2]}{HIDDEN}" if m[1] != "key" and is_secret_name(m[1]) else m[0], _hide_quoted(text)
    )
    for pattern in (_ASSIGNED, _SAID):
        text = pattern.sub(
            lambda m: f"{m[1]}{m[2]}{_in_quotes(m[3])}" if m[1] != "key" and _hides(m[1], m[3]) else m[0], text
        )
    return _WRITTEN.sub(_hide_written, text)


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
                shown.append(f"{name}={HIDDEN if hidden else _hide_word(value)}")
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
    if isinstance(value, Mapping):
        return _mapping(value, instead)
    if isinstance(value, list | tuple):
        made = _sequence(value, instead)
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    if isinstance(value, set | frozenset):
        return type(value)(without_secrets(item, instead) for item in value)
    if isinstance(value, str):
        whole = _WHOLE_REWARD.fullmatch(value)
        text = _hide_reward(whole) if whole else hide(value).replace(f"hf_{HIDDEN}", HIDDEN)
        return value if text == value else text
    if isinstance(value, bytes):
        text = value.decode("latin-1")
        return value if hide(text) == text else hide(text).encode("latin-1")
    if isinstance(value, PurePath):
        text = without_secrets(str(value))
        return value if text == str(value) else type(value)(text)
    return value


def remember(value, is_secret: bool = False) -> None:
    """Have `hide` know the values of secret names in settings, so that no message shows them, whoever writes it."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            remember(item, is_secret or (isinstance(name, str) and is_secret_name(name)))
    elif isinstance(value, list | tuple | set):
        for item in value:
            remember(item, is_secret)
    elif isinstance(value, str):
        whole = _WHOLE_REWARD.fullmatch(value)
        if is_secret:
            _remembered.update(filter(_can_be_told, (value, json.dumps(value)[1:-1])))
        elif whole:
            for part in whole[2].split("&"):
                name, _, text = part.partition("=")
                remember(text, is_secret_name(name))


def _mapping(value: Mapping, instead):
    named = next((value[name] for name in ("name", "key", "header") if isinstance(value.get(name), str)), "")
    secret_value = "value" in value and is_secret_name(named)
    kept = {}
    for name, item in value.items():
        is_secret = isinstance(name, str) and is_secret_name(name) and not (name == "key" and "value" in value)
        if (is_secret or (secret_value and name == "value")) and not (item is None or isinstance(item, bool)):
            if instead is not None:
                kept[name] = instead
            continue
        kept[hide(name) if isinstance(name, str) else name] = without_secrets(item, instead)
    if isinstance(value, dict) and type(value) is not dict:
        try:
            made = value.copy()
            made.clear()
            made.update(kept)
            return made
        except (AttributeError, TypeError):
            return kept
    return kept


def _sequence(items, instead) -> list:
    """Hide what follows a secret's name: in a pair of texts, or behind a flag."""
    if len(items) == 2 and all(isinstance(item, str) for item in items) and is_secret_name(items[0].lstrip("-")):
        return [items[0], HIDDEN]
    made, hidden = [], False
    for item in items:
        if isinstance(item, str) and item.startswith("--"):
            hidden = "=" not in item and is_secret_name(item)
            made.append(hide(item))
        else:
            made.append(HIDDEN if hidden and isinstance(item, str) else without_secrets(item, instead))
            hidden = False
    return made


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


def _hide_query(match: re.Match) -> str:
    before, name, value = match.groups()
    return f"{before}{name}={HIDDEN}" if value and is_secret_name(name) else match[0]


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


def _hide_quoted(text: str) -> str:
    def shown(match: re.Match) -> str:
        quote, name, sign, value = match.groups()
        value = _in_quotes(value) if _hides(name, value) else _hide_quoted(value) if value[0] in "[{" else value
        return f"{quote}{name}{quote}{sign}{value}"

    return _QUOTED.sub(shown, text)


def _hides(name: str, value: str) -> bool:
    plain = value.strip("\\\"'")
    return is_secret_name(name) and plain not in ("", "None", "null", "True", "False", "true", "false", HIDDEN)


def _in_quotes(literal: str) -> str:
    quote = re.match(r"\\?[\"']|", literal)[0]
    return f"{quote}{HIDDEN}{quote}"


def _known() -> list[str]:
    values = (os.environ.get(name, "") for name in tuple(os.environ) if is_secret_name(name))
    return sorted(_remembered.union(filter(_can_be_told, values)), key=len, reverse=True)


def _can_be_told(value: str) -> bool:
    """Tell whether a value is one that no other text holds: a common word in its place would be hidden everywhere."""
    return len(value) >= 8 and not value.startswith("/") and not (value.isalpha() and value.islower())
