"""`posttrain adapters`: LoRA adapters added, truncated to a lower rank, or looked at, without their base model."""

from posttrain.cli.adapters import info, merge, truncate


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "adapters",
        help="add LoRA adapters, truncate one to a lower rank, look at ranks and singular values",
        description="Works on the folders of saved LoRA adapters (adapter_config.json and adapter_model.safetensors), "
        "without their base model. What is written is a plain LoRA.",
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    for verb in (merge, truncate, info):
        verb.add_parser(actions)


def run(args) -> int:
    """Do one of the actions; exit code 2 for an adapter that it cannot take, 3 for a file that is damaged."""
    return args.run_action(args)
