"""The errors a user can meet, each with the command line's exit code."""


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
