"""The errors a user can meet, each with the command line's exit code."""

from importlib.util import find_spec


class PosttrainError(Exception):
    """The base of the library's own errors."""

    exit_code = 1


class ConfigError(PosttrainError, ValueError):
    """A setting that cannot be: unknown, out of range or in conflict with another."""

    exit_code = 2


class DataError(PosttrainError, ValueError):
    """Data that cannot be read or trained on."""

    exit_code = 3


class EnvironmentIssue(PosttrainError, RuntimeError):
    """Something the machine lacks: a package, a file, a connection, a device."""

    exit_code = 4


class DivergedError(PosttrainError, RuntimeError):
    """Training that has left the finite numbers."""

    exit_code = 5


def require(package: str, extra: str, why: str) -> None:
    """Raise EnvironmentIssue, naming the extra to install, where a package is missing."""
    if find_spec(package) is None:
        raise EnvironmentIssue(f'{why} needs the package {package}: pip install "posttrain[{extra}]".')
