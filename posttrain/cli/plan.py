"""`posttrain plan CONFIG`: memory a card by part, steps, tokens and hours of a run, on cards that need not be here."""

import logging
import runpy
from pathlib import Path

from posttrain.checks import shorten
from posttrain.cli.train import methods
from posttrain.console import say, say_json
from posttrain.errors import ConfigError
from posttrain.paths import configs_dir, recipes_dir


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="memory, steps and hours of a run on cards that need not be here",
        description="Computes from a model's shapes, a recipe's settings and a launch what a run needs of each card, "
        "how long it takes, and what would make it fit. No weight is loaded and no card is needed. All other flags "
        "are settings of the recipe, such as --per_device_train_batch_size 4.",
    )
    parser.add_argument("config", help="a recipe's YAML file, or METHOD/NAME of a shipped one: robust_dpo/zero3")
    parser.add_argument("--gpu", default="h100", metavar="CARD", help="h100, a100, l40s, ... or a memory in GB")
    parser.add_argument("--gpus", metavar="N", help="cards of all nodes together; default: the launch file's, or 1")
    parser.add_argument("--nodes", metavar="M", help="machines; default: the launch file's")
    parser.add_argument("--launch", metavar="YAML", help="accelerate's config: a file, or a shipped one: zero2, ddp")
    parser.add_argument("--method", help="the recipe; default: the name of the config's folder")
    parser.add_argument("--rows", metavar="N", help="rows, pairs or prompts of the data set, for steps and hours")
    parser.add_argument("--tokens", metavar="N", help="tokens of a row on average; default: as many as the longest")
    parser.add_argument("--params", metavar="SIZE", help="of a model whose config is not at hand: 7b, 500m")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.set_defaults(takes_settings=True)


def run(args) -> int:
    """Print the plan; exit code 0 whether it fits or not, which `fits` of the JSON tells."""
    import posttrain.quiet  # noqa: F401  before the libraries, of which some speak while they are imported
    from posttrain.adapters.schemes import adapter_config
    from posttrain.cli.launch_refusals import refusal
    from posttrain.planning import cards, plan
    from posttrain.run import private_settings

    card = cards.card_of(args.gpu)
    counts = {name: _count(name, getattr(args, name)) for name in ("gpus", "nodes", "rows", "tokens")}
    config, method = _found(args.config, args.method)
    launch = _launch(config, args.launch, counts["gpus"], counts["nodes"])
    data, model_args, training_args = _settings(method, config, args.settings)
    model = model_args.model_name_or_path
    if args.params is None and not model:
        raise ConfigError("model_name_or_path is not set in the config; set it, or give the size as `--params 7b`.")
    adapter = adapter_config(model_args)
    if training_args.privacy is not None:
        private_settings.check_adapter(adapter)
    job = _job(model, args.params, model_args, training_args, adapter)

    def refused(kind: str) -> str | None:
        policy_is_reference = job.reference != "none" and not job.own_reference
        return refusal(kind, training_args, adapter, policy_is_reference)

    if why := refused(launch.kind):
        raise ConfigError(f"launch is {launch.kind}, which this run is refused under: {why}")
    if counts["tokens"] and counts["tokens"] > job.length:
        raise ConfigError(
            f"tokens is {counts['tokens']:,}, the average of a row, and the settings let in {job.length:,} at most. "
            "Give fewer, or set a greater length in the recipe's settings."
        )
    rows = counts["rows"] or data.max_train_rows
    found = plan.facts(job, launch, card, training_args, rows, counts["tokens"], lambda kind: refused(kind) is None)
    if args.json:
        say_json(found | {"model": model, "method": method, "config": str(config)}, indent=1)
    else:
        say(plan.shown(found, job, model or args.params, approximate=args.params is not None))
    return 0


def _count(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:15]) or len(text) > 15:
        raise ConfigError(f"{name} is {text!r}; it must be a whole number of 1 or more.")
    return int(text)


def _found(name: str, method: str | None) -> tuple[Path, str]:
    """Return the config's path and the method whose recipe reads it."""
    path = Path(name)
    if _is_file(path) is False and len(name) < 256 and path.is_dir():
        raise ConfigError(f"config is {name!r}, a folder; give the YAML file in it.")
    shipped = configs_dir() / f"{name.removesuffix('.yaml')}.yaml"
    if not _is_file(path):
        if ".." in path.parts or not _is_file(shipped) or shipped.parent.name not in methods():
            paths = (one for one in sorted(configs_dir().glob("*/*.yaml")) if one.parent.name in methods())
            known = ", ".join(f"{one.parent.name}/{one.stem}" for one in paths)
            raise ConfigError(f"config is {shorten(name)}: no such file, and none of the shipped ones: {known}.")
        path = shipped
    method = (method or path.resolve().parent.name).replace("-", "_")
    if method not in methods():
        raise ConfigError(
            f"method is {method!r}; it must be one of {', '.join(methods())}. Give it as `--method NAME` where the "
            "config lies in a folder of another name."
        )
    return path, method


def _launch(config: Path, name: str | None, gpus: int | None, nodes: int | None):
    from posttrain.planning import launches

    folder = configs_dir() / "accelerate"
    if name is None:
        # a config that is named as a launch is made for it
        name = config.stem if (folder / f"{config.stem}.yaml").is_file() else "single_gpu"
        if name in ("single_gpu", "cpu"):
            name = "ddp" if (gpus or 1) > 1 else "single_gpu"
    path = next((path for path in (Path(name), folder / f"{name}.yaml") if _is_file(path)), None)
    if path is None:
        known = ", ".join(sorted(one.stem for one in folder.glob("*.yaml")))
        raise ConfigError(f"launch is {shorten(name)}: no such file, and none of the shipped ones: {known}.")
    return launches.read(path, gpus, nodes)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    # a name that is too long for one
    except OSError:
        return False


def _settings(method: str, config: Path, given: list[str]) -> tuple:
    """Return the rows', the model's and the trainer's settings as the recipe reads them, private where it is.

    Raises ConfigError for what the trainer refuses, wherever it is launched.
    """
    from posttrain.config import parse
    from posttrain.log import get_logger
    from posttrain.privacy.config import PrivacyConfig

    log, level = get_logger(), get_logger().level
    # what is chosen for this machine is not what the plan is for
    log.setLevel(logging.WARNING)
    try:
        data, model, args, *beside = parse(_sections(method), ["--config", str(config), *given])
        privacy = next((one for one in beside if isinstance(one, PrivacyConfig)), None)
        return data, model, args if privacy is None else args.as_private(privacy)
    finally:
        log.setLevel(level)


def _sections(method: str) -> tuple:
    """Return the classes of a recipe's settings, which its own names tell."""
    from posttrain.config import DataArguments, ModelArguments
    from posttrain.federated.config import FederatedConfig
    from posttrain.privacy.config import PrivacyConfig
    from posttrain.recipe.tasks import TaskArguments
    from posttrain.run.config import CommonConfig
    from posttrain.trainers.policy_gradient.config import PolicyGradientConfig

    names = runpy.run_path(str(recipes_dir() / f"{method}.py"), run_name="recipe").values()
    classes = [value for value in names if isinstance(value, type)]
    trainers = next(kind for kind in classes if issubclass(kind, CommonConfig))
    rows = [kind for kind in classes if issubclass(kind, DataArguments)]
    if issubclass(trainers, PolicyGradientConfig):
        rows.append(TaskArguments)
    beside = [kind for kind in classes if kind is FederatedConfig]
    beside += [PrivacyConfig | None] if PrivacyConfig in classes else []
    return max(rows, key=lambda kind: len(kind.__mro__)), ModelArguments, trainers, *beside


def _job(model: str | None, params: str | None, model_args, training_args, adapter):
    from posttrain.planning import settings, shapes

    if params is not None:
        config = shapes.config_of_size(shapes.parameters_of(params))
    else:
        config = shapes.config_of(model, model_args.model_revision)
    return settings.job_of(training_args, model_args, shapes.shapes_of(config, adapter))
