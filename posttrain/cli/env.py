"""`posttrain env`: versions beside the tested ones, devices and folders, to paste into a report."""

import platform

from posttrain.console import say, say_json


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("env", help="versions, devices and folders, to paste into a report")
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(args) -> int:
    """Print the facts; exit code 0 whatever they are."""
    import importlib.metadata

    import torch

    import posttrain
    from posttrain.environment import TESTED
    from posttrain.paths import cache_dir

    facts = {"posttrain": posttrain.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name, tested in TESTED.items():
        try:
            version = importlib.metadata.version(name).split("+")[0]
        except importlib.metadata.PackageNotFoundError:
            facts[name] = f"not installed (tested with {', '.join(tested)})"
            continue
        facts[name] = version if version in tested else f"{version} (tested with {', '.join(tested)})"
    if torch.cuda.is_available():
        facts["devices"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        facts["bf16"] = torch.cuda.is_bf16_supported()
    else:
        facts["devices"] = str(torch.accelerator.current_accelerator() or "CPU only")
    facts["threads"] = torch.get_num_threads()
    facts["cache"] = str(cache_dir())
    if args.json:
        say_json(facts, indent=1)
    else:
        for name, value in facts.items():
            say(f"- {name}: {value}")
    return 0
