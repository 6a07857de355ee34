"""The `posttrain` command: a verb a module.

A verb's module has `add_parser(subparsers)`, which adds its flags, and `run(args) -> int`, which does the
work and returns the exit code. It imports heavy libraries inside `run`, so that help is answered at once.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Sequence

import posttrain
from posttrain import outputs, signals
from posttrain.console import complain, guard_tracebacks
from posttrain.errors import EnvironmentIssue, PosttrainError
from posttrain.private import hide_words
from posttrain.visible import one_line, visible

VERBS = ("quickstart", "train", "plan", "recipes", "federated", "data", "env", "generate", "adapters", "merge", "push")

_EPILOG = """exit codes: 0 done, 2 usage or configuration, 3 data, 4 environment, 5 training diverged,
75 ended early with a checkpoint to go on from (--resume_from_checkpoint auto), 128 + n ended by signal n (141: the
reader of its output has gone); 1 is a fault of the program and comes with its traceback"""
# 128 and the number of SIGPIPE, which Python has turned into an error: what a shell has of other programs
_NO_READER = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code."""
    try:
        try:
            return _run(argv)
        finally:
            # what waits in the buffer is written while it can be told that it was not
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if ended := signals.behind(error):
            raise ended from None
        if isinstance(error, BrokenPipeError) and outputs.left_without_reader():
            return _NO_READER
        if error.errno not in outputs.FULL:
            raise
        # what is still in the buffer would end in the same error as Python exits
        with contextlib.suppress(AttributeError, OSError, ValueError):
            outputs.leave(sys.stdout.fileno())
        full = one_line(error.filename) if error.filename else "the disk that the output goes to"
        complain(f"posttrain: error: {full} has no room ({error.strerror}); make some, or write elsewhere.")
        return EnvironmentIssue.exit_code


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="posttrain",
        description="Post-training for data that is noisy, scarce or private.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"posttrain {posttrain.__version__}")
    subparsers = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    modules = {verb: importlib.import_module(f"posttrain.cli.{verb}") for verb in VERBS}
    for module in modules.values():
        module.add_parser(subparsers)
    args, rest = parser.parse_known_args(argv)
    # `train` hands flags it does not know to the recipe; for all other verbs they are mistakes
    args.settings = rest
    guard_tracebacks()
    if rest and not getattr(args, "takes_settings", False):
        parser.error(visible(f"unrecognized arguments: {' '.join(hide_words(rest))}"))
    try:
        # an exception runs what is to run at the end, and reaches a container's first process
        with signals.ended_by_exceptions():
            return modules[args.verb].run(args)
    except PosttrainError as error:
        complain(f"posttrain {args.verb}: error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        # The shell's own number for a program that Ctrl-C ended.
        return 130
