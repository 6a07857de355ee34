"""`posttrain train METHOD`: prints the `accelerate launch` line of a shipped recipe and runs it."""

import os
import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from posttrain import exit_codes, outputs
from posttrain.cli import _supervised
from posttrain.console import complain, say
from posttrain.errors import ConfigError
from posttrain.paths import configs_dir, recipes_dir
from posttrain.private import hide_words


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "train",
        help="run a method's recipe",
        description="Prints the `accelerate launch` line of a recipe and runs it. All other flags are settings of the "
        "recipe, such as --dataset_name pairs.jsonl --flip_rate 0.2; --dry_run shows what would run. "
        "`python RECIPE --help` lists them all; `posttrain recipes copy METHOD` gives you the file.",
    )
    parser.add_argument("method", type=lambda name: name.replace("-", "_"), choices=methods(), help="the recipe")
    parser.add_argument("--config", metavar="YAML", help="a file, or the name of a shipped one: cpu, single_gpu, zero3")
    parser.add_argument(
        "--launch",
        metavar="YAML",
        help="accelerate's config: a file, or a shipped one: cpu_ddp, zero3 ...; of itself ddp on several GPUs",
    )
    parser.set_defaults(takes_settings=True)


def run(args) -> int:
    """Launch the recipe; the exit code is the recipe's own, which `accelerate launch` alone would hide."""
    outputs.keep_going()
    cards = _accelerators()
    default = "single_gpu" if cards else "cpu"
    config = _shipped(args.config or default, configs_dir() / args.method, "config")
    spread = args.launch is None and args.config != "cpu" and cards > 1
    named = "ddp" if spread else args.launch or (default if args.config != "cpu" else "cpu")
    launch = _shipped(named, configs_dir() / "accelerate", "launch")
    recipe = recipes_dir() / f"{args.method}.py"
    # quiet: without it, accelerate adds a traceback of its own to every message of a recipe
    line = ["accelerate", "launch", "--quiet", "--config_file", launch, *_threads(launch)]
    if spread:
        complain(
            f"{cards} GPUs here: a process on each (--launch ddp), and so {cards} times the config's rows a step. "
            "CUDA_VISIBLE_DEVICES=0 in the shell takes one."
        )
        line += ["--num_processes", str(cards)]
    line += [recipe, "--config", config, *args.settings]
    say(_printable(map(str, line)), flush=True)
    # the same interpreter, whatever `accelerate` the PATH would find
    command = [sys.executable, "-m", "posttrain.cli.launcher", *map(str, line[2:])]
    try:
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    except OSError:
        # the code of a process is its run's as well, where no rank ends with another
        return _supervised.run(command, os.environ)
    with folder:
        code_file = Path(folder.name) / "exit_code"
        code = _supervised.run(command, os.environ | {exit_codes.VARIABLE: str(code_file)})
        kept = exit_codes.kept(code_file)
        return code if kept is None else kept


def _threads(launch: Path) -> list[str]:
    """Count the threads of a process for a launch file that names a number: OMP_NUM_THREADS, or the cores there are."""
    import psutil
    import yaml

    from posttrain import yaml_text

    try:
        file = yaml_text.load(yaml_text.read(launch).decode()) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        # accelerate says what is wrong with it
        return []
    if not isinstance(file, dict) or "num_cpu_threads_per_process" not in (file.get("mpirun_config") or {}):
        return []
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS") or max(cores // file["num_processes"], 1)
    return ["--num_cpu_threads_per_process", str(threads)]


def methods() -> list[str]:
    """Return the recipes there are."""
    return sorted(path.stem for path in recipes_dir().glob("*.py"))


def _printable(line: Iterable[str]) -> str:
    """Return the launch line without secrets."""
    line = list(line)
    shown = zip(hide_words(line), line, strict=True)
    return " ".join(shlex.quote(word) if word == given else word for word, given in shown)


def _shipped(name: str, folder: Path, what: str) -> Path:
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path.resolve()
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ConfigError(f"{what} is {name!r}: no such file, and none of the shipped ones: {known}.")


def _accelerators() -> int:
    """Count the accelerators that this process sees."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
