"""The `posttrain` command: a verb a module.

A verb's module has `add_parser(subparsers)`, which adds its flags, and `run(args) -> int`, which does the
work and returns the exit code. It imports heavy libraries inside `run`, so that help is answered at once.
"""

import argparse
import importlib
from collections.abc import Sequence

import posttrain
from posttrain import signals
from posttrain.console import complain, guard_tracebacks
from posttrain.errors import PosttrainError
from posttrain.private import hide_words
from posttrain.visible import visible

VERBS = ("quickstart", "train", "recipes", "data", "env", "generate", "adapters", "merge", "push")

_EPILOG = """exit codes: 0 done, 2 usage or configuration, 3 data, 4 environment, 5 training diverged,
75 ended early with a checkpoint to go on from (--resume_from_checkpoint auto), 128 + n ended by signal n;
1 is a fault of the program and comes with its traceback"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and returns the exit code."""
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
