"""The errors a user can meet, each with the command line's exit code."""

from importlib.util import find_spec

from posttrain.private import hide
from posttrain.visible import visible

# Of longer messages, which quote what others wrote, the middle is left out.
_LONGEST = 20_000


class PosttrainError(Exception):
    """The base of the library's own errors. Their texts show no secrets, and control characters written out."""

    exit_code = 1

    def __str__(self):
        return _shown(super().__str__())


def _shown(text: str) -> str:
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} [...] {text[-_LONGEST // 2 :]}"
    return visible(hide(text))


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


class Preempted(SystemExit):
    """A run that was told to end early, and has saved a checkpoint that it goes on from.

    A program that does not catch it ends with its exit code. It is no Exception, which others catch and go on.
    """

    # EX_TEMPFAIL of sysexits.h: try again later
    exit_code = 75

    def __init__(self, message: str):
        super().__init__(self.exit_code)
        self.message = message

    def __str__(self):
        return _shown(self.message)

    def __reduce__(self):
        return type(self), (self.message,)


def require(package: str, extra: str, why: str) -> None:
    """Raise EnvironmentIssue, naming the extra to install, where a package is missing."""
    if find_spec(package) is None:
        raise EnvironmentIssue(f'{why} needs the package {package}: pip install "posttrain[{extra}]".')
