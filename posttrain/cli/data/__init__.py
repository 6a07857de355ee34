"""`posttrain data`: what a data set holds, which of its tokens are learned, copies converted or with flipped labels."""

import os

from posttrain.cli.data import convert, flip, inspect, stats
from posttrain.errors import ConfigError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "data",
        help="look at a data set's rows and tokens, measure it, convert it, flip some of its labels",
        description="Looks at a data set before anything is trained on it.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    for verb in (inspect, stats, convert, flip):
        verb.add_parser(actions)


def run(args) -> int:
    """Do one of the actions; exit code 3 where the data cannot be trained on."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in ("rows", "limit", "max_length"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    return args.run_action(args)
