"""`posttrain data stats`: counts, lengths, and what `max_length` leaves of the rows."""

from posttrain.cli.data import rewards
from posttrain.cli.data.source import Source, add_as_is, add_source, print_json
from posttrain.console import say


def add_parser(actions) -> None:
    parser = actions.add_parser("stats", help="counts, lengths, and what max_length leaves of the rows")
    add_source(parser)
    add_as_is(parser)
    parser.add_argument("--model", metavar="MODEL", help="count this model's tokens; default: characters")
    parser.add_argument(
        "--max-length", "--max_length", type=int, default=1024, metavar="N", help="in tokens; default: 1024"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="read the first rows only")
    rewards.add_options(parser)
    parser.set_defaults(run_action=run)


def run(args) -> int:
    from posttrain.data import formats

    source = Source(args, args.limit)
    report = source.facts()
    if source.format.kind in formats.PAIR_KINDS:
        report |= source.pair_facts(args.max_length)
    else:
        report |= source.other_facts(args.max_length)
    drawn = rewards.facts(args, source.columns, source.rows[0])
    if "not_drawn" in drawn:
        report["warnings"] = [*report["warnings"], drawn["not_drawn"]]
    else:
        report |= drawn
    if args.json:
        print_json(report)
        return 0

    from posttrain.data.lengths import QUANTILES
    from posttrain.tables import format_table

    say(source.heading())
    for name in ("empty", "identical"):
        if name in report:
            say(f"{name} sides: {report[name]} of {len(source.rows)} rows")
    headers = (report["unit"], *QUANTILES)
    say("\n" + format_table(headers, [(part, *faults.values()) for part, faults in report["lengths"].items()]) + "\n")
    for line in (*report["notes"], *report["warnings"]):
        say(line)
    rewards.draw(drawn)
    return 0
