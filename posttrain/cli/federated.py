"""`posttrain federated init`: a Flower app of federated LoRA, written to a folder to make one's own and to deploy."""

import re
import shutil
from pathlib import Path

import posttrain
from posttrain.checks import check_links
from posttrain.console import say
from posttrain.errors import ConfigError, EnvironmentIssue

_PACKAGE = "federated_app"
_TOML = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "0.1.0"
description = "Federated LoRA with posttrain"
license = "Apache-2.0"
dependencies = ["posttrain[flower]=={version}"]

[tool.hatch.build.targets.wheel]
packages = ["{package}"]

[tool.flwr.app]
publisher = "{publisher}"

[tool.flwr.app.components]
serverapp = "{package}.server_app:app"
clientapp = "{package}.client_app:app"

# What follows is read by {package}/task.py and server_app.py. `flwr run --run-config 'model="..." rank=16'` wins.
[tool.flwr.app.config]
# the names of all clients that take part, as their SuperNodes give them
clients = "{clients}"
# a folder of the server's: reports, checkpoints, the adapter in the end
output = "federated-run"
resume = false
# seconds that the first round waits for all clients
connect-timeout = 600

model = "{model}"
rank = 8
alpha = 8
targets = "q_proj,v_proj"
seed = 0

# of a client's turn
local-steps = 10
batch-size = 4
optimizer = "sgd"
learning-rate = 0.1
max-length = 512

# the fields of posttrain's FederatedConfig
[tool.flwr.app.config.federated]
method = "fedsvd"
rounds = 20
weights = "rows"
# seconds that a round waits for replies
round_timeout = 3600
"""
_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("federated", help="write a Flower app of federated LoRA, to deploy")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    init = actions.add_parser("init", help="write the app into a new folder", description=(
        "Writes an app that runs as it is: pyproject.toml with the settings, and a package with what server and nodes "
        "do, whose task.py is there to be changed. docs/federated.md has the commands that deploy it."
    ))  # fmt: skip
    init.add_argument("folder", type=Path, help="a new folder, or an empty one")
    init.add_argument(
        "--clients", default="client-0,client-1", metavar="NAMES", help="with commas between them; default: %(default)s"
    )
    init.add_argument(
        "--model", default="embedded:smollm2-135m", metavar="MODEL", help="the base; default: %(default)s"
    )


def run(args) -> int:
    folder = args.folder
    check_links(folder, "folder")
    name = re.sub(r"[^a-z0-9]+", "-", folder.absolute().name.lower()).strip("-")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"folder is {folder}, whose name has no letter or digit of ASCII; the app is called by it.")
    clients = [_quoted("--clients", part.strip()) for part in args.clients.split(",")]
    if not all(clients) or len(set(clients)) < len(clients):
        raise ConfigError(f"--clients is {args.clients!r}; it must be names with commas between them, each once.")
    text = _TOML.format(
        name=name, version=posttrain.__version__, package=_PACKAGE, publisher="posttrain",
        clients=",".join(clients), model=_quoted("--model", args.model),
    )  # fmt: skip
    _write(folder, text)
    for path in sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()):
        say(folder / path)
    return 0


def _write(folder: Path, text: str) -> None:
    source = Path(posttrain.__file__).parent / "federated" / "flower" / "app"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"folder is {folder}, which holds something already; choose a new one, or an empty one.")
        (folder / _PACKAGE).mkdir(parents=True)
        for path in sorted(source.glob("*.py")):
            shutil.copyfile(path, folder / _PACKAGE / path.name)
        (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentIssue(f"{folder} cannot be written ({error.strerror}); choose another folder.") from None


def _quoted(flag: str, value: str) -> str:
    """Return a text that stands between quotes in TOML as it is."""
    if not value.isprintable() or '"' in value or "\\" in value:
        raise ConfigError(f"{flag} is {value!r}; leave out quotes, backslashes and what cannot be printed.")
    return value
