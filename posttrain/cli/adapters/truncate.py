"""`posttrain adapters truncate`: the best approximation of a LoRA adapter of a lower rank."""

from posttrain.cli.adapters.output import add_output, folder, write
from posttrain.errors import ConfigError


def add_parser(actions) -> None:
    parser = actions.add_parser(
        "truncate",
        help="write the best approximation of an adapter of a lower rank",
        description="Keeps the largest singular values of what the adapter adds to each module, and tells the error.",
    )
    parser.add_argument("adapter", type=folder, metavar="ADAPTER", help="folder of the adapter")
    add_output(parser)
    parser.set_defaults(run_action=run)


def run(args) -> int:
    if args.rank is None and args.energy is None:
        raise ConfigError("neither --rank nor --energy is given; give one: a rank, or a share of the squared values.")
    return write(args, [args.adapter])
