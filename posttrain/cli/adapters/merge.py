"""`posttrain adapters merge`: a weighted sum of LoRA adapters, exact or of a lower rank."""

from posttrain.cli.adapters.output import add_output, folder, write


def add_parser(actions) -> None:
    parser = actions.add_parser(
        "merge",
        help="write the weighted sum of adapters as one",
        description="Adds W1 B1 A1 + W2 B2 A2 + ..., scales included, and writes the sum as one LoRA of its own rank, "
        "or its best approximation of a lower one. Ranks, alphas and adapted modules may differ.",
    )
    parser.add_argument("adapters", nargs="+", type=folder, metavar="ADAPTER", help="folders of the adapters")
    add_output(parser)
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each adapter, of any sign; default: 1"
    )
    parser.add_argument("--base", metavar="MODEL", help="the base model, where the adapters name it differently")
    parser.set_defaults(run_action=run)


def run(args) -> int:
    return write(args, args.adapters, args.weights, args.base)
