"""The adapter that a verb of `posttrain adapters` writes, and what is said of it."""

import argparse
from pathlib import Path

from posttrain.console import say, say_json
from posttrain.errors import ConfigError
from posttrain.private import hide
from posttrain.visible import one_line

# modules of which the error is told
_SHOWN = 5


def folder(text: str) -> Path:
    """Return the path that an argument names, which may not be empty: that would be the working folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give the folder of an adapter")
    return Path(text)


def add_output(parser) -> None:
    parser.add_argument("output", type=folder, metavar="OUTPUT", help="folder of the result; must be empty or new")
    parser.add_argument("--rank", type=int, metavar="N", help="the most that a module's rank may be")
    parser.add_argument(
        "--energy", type=float, metavar="E", help="in (0, 1]: the share of the sum of squared singular values to keep"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the result; default: float32"
    )
    parser.add_argument("--json", action="store_true", help="for scripts")


def write(args, adapters: list[Path], weights: list[float] | None = None, base: str | None = None) -> int:
    """Write the sum of adapters into `args.output`, say what it is, and return the exit code."""
    from posttrain import quiet
    from posttrain.adapters.saved_lora import check_new

    check_new(args.output)
    for folder in adapters:
        if args.output.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"output is {args.output}, inside the adapter {folder}; give a folder outside of it.")
    quiet.quiet_libraries()
    import torch

    from posttrain.adapters.low_rank import merge_adapters

    made = merge_adapters(adapters, weights, args.rank, energy=args.energy, base=base, dtype=getattr(torch, args.dtype))
    made.save(args.output, _tokenizer_of(adapters))
    facts = {
        "output": str(args.output),
        "adapters": list(map(str, adapters)),
        "weights": weights or [1.0] * len(adapters),
        "dtype": args.dtype,
        "relative_error": made.relative_error,
        "modules": {path: part._asdict() for path, part in made.parts.items()},
    }
    if args.json:
        say_json(facts)
        return 0
    from posttrain.tables import format_table

    parts = made.parts.values()
    kept, exact = ([getattr(part, name) for part in parts] for name in ("rank", "exact_rank"))
    say(
        hide(f"{args.output}: {len(made.parts)} modules of rank {_span(kept)}, of an exact sum of rank {_span(exact)}.")
    )
    say(f"Relative error: {made.relative_error:.3g} of the Frobenius norm of all changes, stored as {args.dtype}.")
    if zero := sum(not any(part.singular_values) for part in parts):
        say(f"The sum is zero in {zero} of {len(made.parts)} modules: they change nothing, and are stored as rank 1.")
    worst = sorted(made.parts.items(), key=lambda item: -item[1].relative_error)[:_SHOWN]
    rows = [
        (one_line(path), " + ".join(map(str, part.ranks)), part.exact_rank, part.rank, f"{part.relative_error:.3g}")
        for path, part in worst
    ]
    say("\n" + format_table(("largest errors", "ranks", "exact", "kept", "relative error"), rows))
    return 0


def _span(values: list[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _tokenizer_of(adapters: list[Path]) -> dict[str, Path]:
    """Return the files of the tokenizer beside the adapters; none, and a word, where they have different ones."""
    from posttrain.hub.files import TOKENIZER
    from posttrain.hub.own_files import found, name_links
    from posttrain.log import get_logger
    from posttrain.whole_files import digest

    with_one = []
    for folder in adapters:
        name_links(folder, TOKENIZER)
        if files := found(folder, TOKENIZER):
            with_one.append(files)
    if not with_one:
        return {}
    digests = [{name: digest(path) for name, path in files.items()} for files in with_one]
    if any(one != digests[0] for one in digests):
        get_logger().warning("the adapters come with different tokenizers, so none is copied; the base's is used")
        return {}
    return with_one[0]
