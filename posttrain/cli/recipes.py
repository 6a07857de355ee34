"""`posttrain recipes list | copy`: the scripts and settings that ship with the library, to run or to make one's own."""

import shutil
from pathlib import Path

from posttrain.console import say
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.paths import configs_dir, recipes_dir


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("recipes", help="list the shipped recipes, or copy one to edit")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    actions.add_parser("list", help="recipes, their configs, and accelerate's")
    copy = actions.add_parser("copy", help="copy a recipe and its configs into a folder")
    copy.add_argument("method", help="the recipe's name, as `list` shows it")
    copy.add_argument("folder", nargs="?", default=".", type=Path, help="default: here")
    copy.add_argument("--force", action="store_true", help="write over files that are there")


def run(args) -> int:
    return _list() if args.action == "list" else _copy(args.method, args.folder, args.force)


def _list() -> int:
    for recipe in sorted(recipes_dir().glob("*.py")):
        summary = recipe.read_text().split('"""')[1].strip().splitlines()[0]
        say(f"{recipe.stem:16} {summary}")
        say(f"{'':16} configs: {_names(configs_dir() / recipe.stem)}")
    say(f"{'accelerate':16} configs: {_names(configs_dir() / 'accelerate')}")
    return 0


def _copy(method: str, folder: Path, force: bool) -> int:
    recipe = recipes_dir() / f"{method}.py"
    if not recipe.is_file():
        known = ", ".join(sorted(path.stem for path in recipes_dir().glob("*.py")))
        raise ConfigError(f"method is {method!r}; it must be one of {known}.")
    sources = {recipe: folder / recipe.name}
    for kind in (method, "accelerate"):
        for path in sorted((configs_dir() / kind).glob("*.yaml")):
            sources[path] = folder / "configs" / kind / path.name
    there = [str(target) for target in sources.values() if target.exists()]
    if there and not force:
        raise ConfigError(f"{there[0]} is there already; choose another folder, or write over it with --force.")
    for source, target in sources.items():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as error:
            raise EnvironmentIssue(f"{target} cannot be written ({error.strerror}); choose another folder.") from None
        say(target)
    return 0


def _names(folder: Path) -> str:
    return ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
