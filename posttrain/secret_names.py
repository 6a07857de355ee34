"""Which names of settings, headers, variables and query values are those of a secret. Standard library only."""

import functools
import re

# Words that make a name a secret's wherever they stand in it
_SECRET = {
    "secret", "secrets", "password", "passwords", "passwd", "passphrase", "passcode", "passwort", "pwd", "credential",
    "credentials", "creds", "authorization", "authorisation", "bearer", "cookie", "cookies", "jwt", "apikey", "apikeys",
    "authtoken", "accesstoken", "webhook", "sastoken", "privkey", "psk", "mnemonic", "csrf", "xsrf", "kennwort",
    "contrasena", "totp",
}  # fmt: skip
# ... where they are its last word
_SECRET_AT_END = {"auth", "signature", "sig", "pass", "passe", "dsn", "otp", "token", "key", "pw", "cred", "pat", "sas"}
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
    "every", "extra", "fake", "first", "forced", "ignore", "image", "initial", "last", "mask", "max", "middle", "min",
    "new", "next", "num", "pad", "padding", "per", "placeholder", "prefix", "previous", "prompt", "reasoning",
    "response", "row", "sep", "separator", "single", "special", "start", "step", "stop", "suffix", "system", "think",
    "thinking", "tile", "tool", "turn", "unk", "unknown", "video", "vision", "vocab", "word",
}  # fmt: skip
_TABLES = {
    "answer", "attention", "attn", "cache", "chosen", "column", "completion", "config", "cross", "data", "dataset",
    "dict", "feature", "foreign", "gold", "group", "image", "index", "input", "json", "label", "main", "message",
    "messages", "metric", "metrics", "order", "output", "partition", "past", "primary", "prng", "prompt", "public",
    "query", "question", "rejected", "relative", "response", "reward", "row", "score", "self", "sort", "split", "state",
    "task", "text", "train", "value", "video",
}  # fmt: skip
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_RUN_TOGETHER = re.compile(
    r"passw|secret|credential|(?:access|api|auth|bearer|hf|hub|private|refresh|session|ssh)_?(?:token|key)s?$"
    r"|app_?key$|user_?pwd$|sess_?id$|(?:presigned|signed|sas)_?url$"
    r"|conn(?:ection)?[_-]?str(?:ing)?$|connection_?string|seed_?phrase|(?:^|_)(?:database|db|mongo|postgres|redis|broker|amqp)_?(?:url|uri)$"
)
# which goes with a signature, or is as good as a login
_KEY_ID = re.compile(r"access_?key_?id|key_pair_id|google_?access_?id|session_?id$", re.IGNORECASE)


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
    if last == "pw":
        return not {"conv", "log"}.intersection(before)
    return last != "pass" or not before or before[-1] not in {"forward", "backward", "per", "first", "last", "second"}
