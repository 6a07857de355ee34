"""The errors a user can meet, each with the command line's exit code."""

import re
from importlib.util import find_spec

# a token of the hub as a word of its own; hf_pairs.jsonl and hf_org/name are names
_TOKEN = re.compile(r"(?<![\w./-])hf_[\w-]{4,}(?![\w-]|[./]\w)")


def hide_tokens(text: str) -> str:
    """Return `text` with every token of the hub as `hf_***`."""
    return _TOKEN.sub("hf_***", text)


class PosttrainError(Exception):
    """The base of the library's own errors."""

    exit_code = 1

    def __str__(self):
        return hide_tokens(super().__str__())


class ConfigError(PosttrainError, ValueError):
    """A setting that cannot be: unknown, out of range or in conflict with another."""

    exit_code = 2


class ExcludedSetting(ConfigError):
    """Settings that exclude each other, or of which one leaves another without effect.

    Args:
        message: what is wrong and how to mend it.
        yields: for each setting that may be left out, the settings that it gives way to. The parser leaves it out
            where it stands in a file and one of those on the command line; anything else is an error.
    """

    def __init__(self, message: str, yields: dict[str, tuple[str, ...]]):
        super().__init__(message)
        self.yields = yields


class DataError(PosttrainError, ValueError):
    """Data that cannot be read or trained on."""

    exit_code = 3


class EnvironmentIssue(PosttrainError, RuntimeError):
    """Something the machine lacks: a package, a file, a connection, a device."""

    exit_code = 4


class DivergedError(PosttrainError, RuntimeError):
    """Training that has left the finite numbers."""

    exit_code = 5


class Preempted(PosttrainError, RuntimeError):
    """A run that was told to end early, and has saved a checkpoint that it goes on from."""

    # EX_TEMPFAIL of sysexits.h: try again later
    exit_code = 75


def require(package: str, extra: str, why: str) -> None:
    """Raise EnvironmentIssue, naming the extra to install, where a package is missing."""
    if find_spec(package) is None:
        raise EnvironmentIssue(f'{why} needs the package {package}: pip install "posttrain[{extra}]".')
