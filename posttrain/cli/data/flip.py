"""`posttrain data flip`: a copy in which some rows have chosen and rejected swapped."""

from posttrain.cli.data.output import output_file, write_lines
from posttrain.cli.data.source import add_source, print_json
from posttrain.console import say
from posttrain.errors import ConfigError, DataError
from posttrain.private import hide


def add_parser(actions) -> None:
    parser = actions.add_parser("flip", help="write a copy in which some rows have chosen and rejected swapped")
    add_source(parser)
    parser.add_argument("out", metavar="OUT", help="a .jsonl or .jsonl.gz file; its column flipped says which rows")
    parser.add_argument("--rate", type=float, required=True, metavar="R", help="share of the rows to swap, in [0, 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which rows; default: 0")
    parser.add_argument("--force", action="store_true", help="write over OUT")
    parser.set_defaults(run_action=run)


def run(args) -> int:
    if not 0 <= args.rate < 1:
        raise ConfigError(f"--rate is {args.rate}; it must lie in [0, 1): the share of the rows to swap.")
    out = output_file(args)

    import datasets

    from posttrain.data import shapes
    from posttrain.data.corruption import flip_row, lone_columns, rows_to_flip
    from posttrain.data.rows import cells, columns_of, rows_of
    from posttrain.data.sources import read_rows

    datasets.disable_progress_bars()
    rows, places = read_rows(args.source, args.split)
    for row, place in zip(rows, places, strict=True):
        missing = [name for name in ("chosen", "rejected") if name not in row]
        if missing:
            shape = shapes.find(list(row), row, (shapes.PAIRS,), place)
            remedy = f" Convert these {shape.name} rows first, with `posttrain data convert`." if shape else ""
            raise DataError(
                f"{place}: {' and '.join(map(repr, missing))} missing; found {columns_of([row])}. Only preference "
                f"pairs can be flipped: every row needs chosen and rejected.{remedy}"
            )
    chosen = rows_to_flip(len(rows), args.rate, args.seed)
    flipped = [flip_row(row, index in chosen) for index, row in enumerate(rows)]
    swapped = len(chosen)
    lost = lone_columns(row for index, row in enumerate(rows) if index in chosen)
    write_lines(out, rows_of(cells(flipped, places)))
    if args.json:
        facts = {"output": str(out), "rows": len(rows), "flipped": swapped, "rate": args.rate, "seed": args.seed}
        print_json(facts | ({"warnings": lost} if lost else {}))
    else:
        say(
            f"{hide(str(out))}: {len(rows)} rows, {swapped} of them with chosen and rejected swapped (seed {args.seed})"
        )
        for said in lost:
            say(said)
    return 0
