"""`posttrain data convert`: a copy in the form that training reads."""

from posttrain.cli.data.output import output_file, write_lines
from posttrain.cli.data.source import add_source, print_json
from posttrain.console import say
from posttrain.private import hide


def add_parser(actions) -> None:
    parser = actions.add_parser("convert", help="write a copy in the form that training reads, messages and all")
    add_source(parser)
    parser.add_argument("out", metavar="OUT", help="a .jsonl or .jsonl.gz file")
    parser.add_argument("--to", choices=("pairs", "answers", "tasks"), help="where rows can be read in several ways")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first rows only")
    parser.add_argument("--force", action="store_true", help="write over OUT")
    parser.set_defaults(run_action=run)


def run(args) -> int:
    from posttrain import quiet

    out = output_file(args)
    quiet.quiet_libraries()
    from posttrain.data import shapes, turns
    from posttrain.data.rows import cells, columns_of, rows_of
    from posttrain.data.sources import read_rows

    rows, places = read_rows(args.source, args.split, args.limit)
    rows = turns.read_all(rows, places, args.source)
    found = shapes.of_any_kind(columns_of(rows), rows[0], args.to, args.source)
    made, places = shapes.as_ours(rows, places, found, args.source)
    write_lines(out, rows_of(cells(made, places)))
    if args.json:
        facts = {"output": str(out), "rows": len(made), "read": len(rows), "from": found.name, "to": found.kind}
        print_json(facts | {"why": found.why})
    else:
        say(f"{hide(str(out))}: {len(made)} rows ({found.kind}) of {len(rows)} {found.name} rows ({found.why})")
    return 0
