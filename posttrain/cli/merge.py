"""`posttrain merge`: an adapter folded into its base, and a check that the merged model still says the same."""

from pathlib import Path

from posttrain.checks import check_links
from posttrain.console import say, say_json
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.private import hide


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="fold an adapter into its base model and check the result",
        description="Loads the base in bf16 (or --dtype), merges the adapter, saves, loads the merged model again and "
        "compares its logits with those of base and adapter.",
    )
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("output", type=Path, help="folder of the merged model; must be empty or new")
    parser.add_argument("--base", help="base model; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument("--verbose", action="store_true", help="let the libraries' own messages through")


def run(args) -> int:
    """Merge; exit code 0 once the merged model was saved and agrees, 4 where it is another one."""
    check_links(args.output, "output")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ConfigError(f"output is {args.output}, which is not empty; give a new folder.")

    from posttrain import quiet
    from posttrain.adapters.loading import base_of

    base_of(args.adapter, args.base)
    if not args.verbose:
        quiet.quiet_libraries()
    from safetensors import SafetensorError

    from posttrain.hub.merging import merge_adapter

    try:
        found = merge_adapter(args.adapter, args.output, args.base, args.dtype)
    except (OSError, SafetensorError) as error:
        raise EnvironmentIssue(f"output is {args.output}, which cannot be written: {error}.") from error
    facts = {"output": str(args.output), "dtype": args.dtype, **found._asdict()}
    if args.json:
        say_json(facts)
    else:
        say(hide(f"Merged into {args.output} in {args.dtype}."))
        say(f"Against base and adapter, on {found.tokens} tokens: largest logit difference", end=" ")
        say(f"{found.largest_logit_difference:.3g}, top-1 agreement {found.top1_agreement:.1%}.")
    return 0
