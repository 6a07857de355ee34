"""Texts that are secrets by their form: tokens of services, JWTs, private keys, what URLs hold of users and logins."""

import base64
import re
from urllib.parse import unquote

from posttrain.secret_names import is_secret_name

HIDDEN = "***"

# Texts that are secrets by their form
_FORMS = re.compile(
    r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END(?:[A-Z ]{0,60}-----)?|\Z)"
    r"|(?<![A-Za-z0-9])eyJ[\w-]{5,}(?:\.[\w-]{2,}\.[\w-]*(?:\.[\w-]+){0,2}|\.\.[\w-]+\.[\w-]+\.[\w-]+)"
    r"|(?<![\w-])(?:sk|pk|rk)[-_](?=[\w-]{0,80}[0-9A-Z])[\w-]{8,}"
    r"|\b(?:gh[pousr]_|github_pat_|glpat-|xox[a-z]-|gsk_|nvapi-|dckr_pat_|npm_|pypi-AgE|dop_v1_|shpat_|r8_|hv[sbr]\."
    r"|GOCSPX-|tgp_v1_|lin_api_|figd_|sq0[a-z]{3}-|whsec_|xapp-\d-)[\w-]{8,}|\b(?:hf_oauth|api_org)_[A-Za-z0-9]{12,}"
    r"|\bsecret_(?=[A-Za-z]*\d)[A-Za-z0-9]{16,}|\bkey-[0-9a-f]{32}\b|\bAGE-SECRET-KEY-\w{4,}|\b(?:xai-|pplx-|ntn_)(?=[A-Za-z]*\d)\w{12,}"
    r"|\bdapi[0-9a-f]{32}"
    r"|(?<!\d)\d{8,12}:AA[\w-]{30,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b|\bAIza[\w-]{20,}|\bya29\.[\w-]{8,}|\bSG\.[\w-]{8,}\.[\w-]{8,}"
    r"|(?<=hooks\.slack\.com/services/)[\w/]+|(?<=/api/webhooks/)[\w/-]+|(?<=\.office\.com/webhook/)[\w/@-]+"
    r"|(?<=hooks\.zapier\.com/hooks/catch/)[\w/-]+",
    re.DOTALL,
)
# a token of the hub has letters and digits alone; hf_pairs.jsonl, hf_org/name and hf_raise_for_status are names
_HUB_TOKEN = re.compile(r"(?<![\w./-])hf_[A-Za-z0-9]{10,}(?![\w-]|[./]\w)|(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}")
_BEARER = re.compile(
    r"\b(Bearer\s+|bearer\s+(?=[\w.~+/=-]*\d[\w.~+/=-]*)(?=\S{8}))[\w.~+/=-]{4,}|\b(Token\s+)(?=[a-zA-Z_-]*\d)[\w.~+/=-]{8,}"
)
# to the end of the line: its parts are quoted, and the name of the user is one of them
_DIGEST = re.compile(r"\b(Digest\s+)(?=\w+=)(?=[^\r\n]*\b(?:response|nonce)=)[^\r\n]+")
# of a user and password in base64
_BASIC = re.compile(r"\b(Basic\s+)([A-Za-z0-9+/]{6,}={0,2})(?![\w+/])", re.IGNORECASE)
# The second form is of passwords that hold /, ? or #; a port and what follows it are none
_USER = r"(?:[^/\s?#'\"]+@|(?![^/\s?#'\":@]*:\d{1,5}[/?#])[^/\s?#'\"@:\[]*:[^\s'\"@<>]{1,200}@(?=[\w\[]))"
_USER_OF_URL = re.compile(rf"(?<=://){_USER}")
# a URL that was made a path has one slash: https:/me:pw@host/x
_USER_OF_PATH = re.compile(rf"\b([a-z][a-z0-9]{{1,9}}(?:[+.-][a-z0-9]{{1,9}})?:/){_USER}")
_ENCODED_USER = re.compile(r"(%3A%2F%2F)(?:(?!%40|%2F)[^\s&#'\"]){1,200}%40", re.IGNORECASE)
_CURL = re.compile(r"(?<![\w-])((?:-u|-U|--user|--proxy-user)(?:\s+|=)['\"]?[^\s:'\"]{1,100}:)(?!//)[^\s'\"]+")

_NAME = r"[A-Za-z_][\w.-]*"
_QUERY = re.compile(rf"([?&;#])([A-Za-z_%][\w.%\[\]-]*)=([^&#;\s'\"<>`]*(?:;(?!{_NAME}=)[^&#;\s'\"<>`]+)*)")
_ENCODED_QUERY = re.compile(r"(%(?:3F|26|23))([\w.-]{1,80})(%3D)((?:[^&#\s'\"<>`%]|%(?!26|23))+)", re.IGNORECASE)


def hide_forms(text: str) -> str:
    """Return a text with what is a secret by its form hidden: tokens of services, JWTs, private keys, users of URLs."""
    text = _FORMS.sub(HIDDEN, text)
    # most texts hold none of these, and are seen a thousand times a run
    if "hf_" in text:
        text = _HUB_TOKEN.sub(f"hf_{HIDDEN}", text)
    if "://" in text:
        text = _USER_OF_URL.sub(f"{HIDDEN}@", text)
    if ":/" in text and "@" in text:
        text = _USER_OF_PATH.sub(rf"\1{HIDDEN}@", text)
    if "curl" in text:
        text = _CURL.sub(rf"\1{HIDDEN}", text)
    text = _BASIC.sub(_hide_basic, _BEARER.sub(lambda m: f"{m[1] or m[2]}{HIDDEN}", text))
    if "=" in text:
        text = _DIGEST.sub(rf"\1{HIDDEN}", text)
        text = _QUERY.sub(_hide_query, text)
    if "%3" in text:
        text = _ENCODED_USER.sub(rf"\1{HIDDEN}%40", text)
        text = _ENCODED_QUERY.sub(_hide_encoded_query, text)
    return text


def _hide_query(match: re.Match) -> str:
    before, name, value = match.groups()
    return f"{before}{name}={HIDDEN}" if value and is_secret_name(unquote(name)) else match[0]


def _hide_encoded_query(match: re.Match) -> str:
    return f"{match[1]}{match[2]}{match[3]}{HIDDEN}" if is_secret_name(match[2]) else match[0]


def _hide_basic(match: re.Match) -> str:
    try:
        says = base64.b64decode(match[2] + "=" * (-len(match[2]) % 4)).decode()
    except ValueError:
        return match[0]
    return f"{match[1]}{HIDDEN}" if ":" in says and says.isprintable() else match[0]
