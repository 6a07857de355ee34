"""Regular expressions of strangers, matched in bounded time.

Python's matcher tries all ways in which a pattern can stand for a text, of which `(a*)*b` has more than a run lasts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from posttrain.bounded import Overtime, in_time
from posttrain.checks import shorten
from posttrain.errors import ConfigError

LONGEST = 1000
# for all names of a model's modules
SECONDS = 2.0
# A part that can come more often than this multiplies the ways of what is in it.
_FEW = 3
# What an adapter's config holds as patterns. A value can be a text, a list, or a mapping whose keys they are.
_OF_ADAPTERS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "modules_to_save")
_PLAIN = re.compile(r"[\w.\\/-]*")
_CATEGORIES = {"CATEGORY_DIGIT": r"\d", "CATEGORY_SPACE": r"\s", "CATEGORY_WORD": r"\w"}


def check(pattern, name: str, flags: int = 0) -> re.Pattern:
    """Compile a regular expression that takes no more than a power of a text's length to match.

    Raises ConfigError, with the name of the setting, for what is none, for more than `LONGEST` characters, and for
    repeats in which a repeat or alternatives can stand for the same text in several ways.
    """
    if isinstance(pattern, str) and len(pattern) > LONGEST:
        raise ConfigError(
            f"{name} is a pattern of {len(pattern):,} characters, and {LONGEST:,} are the most. Write a shorter one."
        )
    try:
        compiled = re.compile(pattern, flags)
        ambiguous = _has_many_ways(re._parser.parse(pattern, flags))
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{name}={shorten(pattern)} is no regular expression: {error}.") from None
    if ambiguous:
        raise ConfigError(
            f"{name}={shorten(pattern)} repeats what has repeats or alternatives in it that can stand for the same "
            "text in several ways, which can take for ever to match. Write the inner ones so that they keep what they "
            "took: `*+`, `++`, `?+`, `(?>a|b)`."
        )
    return compiled


def check_adapter(config, owner: str = "") -> list[str]:
    """Check as `check` does the patterns in an adapter's config: a `PeftConfig`, or the mapping in its file.

    `owner`: what the names of its settings begin with in messages. Returns the patterns.
    """
    found = []
    for name, pattern in _patterns_of(config if isinstance(config, Mapping) else vars(config)):
        check(pattern, f"{owner}{name}")
        found.append(pattern)
    return found


def check_on(patterns: Iterable[str], names: Iterable[str], what: str) -> None:
    """Raise ConfigError where to match all names of modules takes more than `SECONDS`. `what`: whose patterns."""
    names = list(names)
    try:
        with in_time(SECONDS):
            for pattern in patterns:
                # as PEFT does with names in a mapping
                matches = re.compile(rf"(.*\.)?({pattern})$").match
                for name in names:
                    matches(name)
    except Overtime:
        raise ConfigError(
            f"{what}: to match its patterns ({shorten(list(patterns))}) with the names of the model's modules takes "
            f"more than {SECONDS:g} s. Name the modules in a list instead."
        ) from None
    # one that stands for itself is none behind another
    except re.error as error:
        raise ConfigError(f"{what} has a pattern that cannot be used: {error}.") from None


def _patterns_of(config: Mapping) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        if name not in _OF_ADAPTERS and not str(name).endswith("_pattern"):
            continue
        # names in a list are compared as they are, those of `modules_to_save` and `layers_pattern` are not
        for text in [value] if isinstance(value, str) else list(value or ()) if _is_several(value) else ():
            if isinstance(text, str) and not _PLAIN.fullmatch(text):
                yield name, text


def _is_several(value) -> bool:
    return isinstance(value, Mapping | list | tuple | set | frozenset)


def _has_many_ways(nodes, times: int = 1) -> bool:
    """Tell whether a part that comes several times can stand for one text in several ways.

    `nodes`: the parts of a parsed pattern. `times`: how often they can come.
    """
    nodes, repeated = list(nodes), times > _FEW
    for place, (kind, value) in enumerate(nodes):
        kind = str(kind)
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, part = value
            if repeated and least != most and not _ends_at(part, nodes[place + 1 :]):
                return True
            if _has_many_ways(part, times * max(most, 1)):
                return True
        elif kind == "BRANCH":
            if repeated and not _are_told_apart(value[1]):
                return True
            if any(_has_many_ways(part, times) for part in value[1]):
                return True
        elif kind == "SUBPATTERN":
            if _has_many_ways(value[3], times):
                return True
        elif kind == "GROUPREF_EXISTS":
            if any(_has_many_ways(part, times) for part in value[1:] if part is not None):
                return True
        # these keep what they took
        elif kind == "POSSESSIVE_REPEAT":
            if _has_many_ways(value[2]):
                return True
        elif kind == "ATOMIC_GROUP":
            if _has_many_ways(value):
                return True
        elif kind in ("ASSERT", "ASSERT_NOT"):
            if _has_many_ways(value[1]):
                return True
    return False


def _ends_at(part, behind: list) -> bool:
    """Tell whether the repeats of a single character end at the character behind them, which is none of theirs."""
    if len(part) != 1 or not behind or str(behind[0][0]) != "LITERAL":
        return False
    char = chr(behind[0][1])
    return not any(_takes(part[0], ord(form)) for form in {char, *char.lower(), *char.upper()})


def _takes(node, char: int) -> bool:
    kind, value = str(node[0]), node[1]
    if kind == "LITERAL":
        return chr(value).lower() == chr(char).lower()
    if kind == "NOT_LITERAL":
        return value != char
    if kind != "IN":
        return True
    negated = str(value[0][0]) == "NEGATE"
    return negated != any(_holds(item, char) for item in value)


def _holds(item, char: int) -> bool:
    kind, value = str(item[0]), item[1]
    if kind == "CATEGORY":
        positive = _CATEGORIES.get(str(value).replace("_NOT", ""))
        # of another kind, and so not told apart
        return positive is None or bool(re.match(positive, chr(char))) != ("_NOT" in str(value))
    return kind == "LITERAL" and value == char or kind == "RANGE" and value[0] <= char <= value[1]


def _are_told_apart(alternatives) -> bool:
    """Tell whether each alternative begins with a character of its own."""
    firsts = [part[0] if len(part) else None for part in alternatives]
    if any(first is None or str(first[0]) != "LITERAL" for first in firsts):
        return False
    return len({chr(first[1]).lower() for first in firsts}) == len(firsts)
