"""Flower in the environment of its own that scripts/flower_env.sh makes: apps in one process, and a deployment."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from posttrain.cli import main
from posttrain.federated.clients import TrainerClients
from posttrain.federated.flower.app import task
from posttrain.federated.flower.settings import federated_config
from posttrain.federated.loop import FederatedLoop

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
# of two rounds of two clients, whose processes import everything anew for each message
PATIENCE = 600


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The Python that has Flower."""
    folder = tmp_path_factory.mktemp("flower") / "env"
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "flower_env.sh", folder],
        env=os.environ | {"POSTTRAIN_MAIN_PYTHON": sys.executable}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def environment(python, home):
    given = {
        "PATH": f"{python.parent}:{os.environ['PATH']}", "FLWR_HOME": str(home), "HF_HOME": str(home / "hf"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "POSTTRAIN_CACHE": os.environ["POSTTRAIN_CACHE"], "POSTTRAIN_LOG": "info",
    }  # fmt: skip
    return {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"} | given


def test_apps_in_one_process(python, tmp_path):
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-o", "filterwarnings=default"]
    done = subprocess.run(
        [*command, "tests/federated/flower_apps.py"], cwd=ROOT, env=environment(python, tmp_path),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= 62 and "skipped" not in done.stdout


def test_the_environment_leaves_the_main_one_alone(python):
    where = subprocess.run(
        [python, "-c", "import flwr, torch, typer; print(flwr.__file__, torch.__file__, typer.__file__, sep='\\n')"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    folder = str(python.parents[1])
    assert where[0].startswith(folder) and where[2].startswith(folder)
    # there is one torch, the main one's
    assert where[1] == torch.__file__


@pytest.fixture
def app(tmp_path):
    """An app as `posttrain federated init` writes it, its settings, and the rows of two clients."""
    folder = tmp_path / "app"
    assert main(["federated", "init", str(folder), "--model", "embedded:tiny"]) == 0
    values = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {name: value for name, value in values.items() if name != "federated"}
    flat |= {f"federated.{name}": value for name, value in values["federated"].items()}
    short = {"federated.rounds": 2, "local-steps": 3, "batch-size": 2, "max-length": 64, "rank": 4}
    data = {}
    for number, name in enumerate(values["clients"].split(",")):
        data[name] = tmp_path / f"{name}.jsonl"
        texts = [f"client {number} has row {row}: {'abc' * (row + number)}" for row in range(8 + 4 * number)]
        data[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder, flat | short, short, data


def in_loop(settings, data):
    """What the loop makes of the same settings and rows, in this process."""
    config = federated_config(settings)
    nodes = {name: SimpleNamespace(config={"data": str(data[name])}) for name in sorted(data)}
    rows = {name: task.rows(node) for name, node in nodes.items()}
    clients = TrainerClients(task.adapted(settings), rows, task.builder(settings), config)
    loop = FederatedLoop(clients.start, clients.rows, clients, config)
    return clients, loop.run()


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def started(command, log, **given):
    """A process with those that it starts, which end with it."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **given
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_for(port, process):
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert process.poll() is None
        time.sleep(0.2)


def test_a_deployment_has_the_bits_of_the_loop(python, app, tmp_path):
    folder, settings, short, data = app
    bin, link = python.parent, free_port()
    homes = {name: tmp_path / f"home-{name}" for name in ("server", *data)}
    for home in homes.values():
        home.mkdir()
    (homes["server"] / "config.toml").write_text(
        f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    output = tmp_path / "output"
    given = {**short, "output": str(output), "federated.round_timeout": 300, "connect-timeout": 120}
    text = " ".join(f"{name}={json.dumps(value)}" for name, value in given.items())
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(started(
            [bin / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", link,
             "--disable-runtime-dependency-installation"],
            tmp_path / "superlink.log", cwd=homes["server"], env=environment(python, homes["server"]),
        ))  # fmt: skip
        wait_for(link, server)
        for name, path in data.items():
            stack.enter_context(started(
                [bin / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", free_port(),
                 "--node-config", f'client="{name}" data="{path}"'],
                tmp_path / f"{name}.log", cwd=homes[name], env=environment(python, homes[name]),
            ))  # fmt: skip
        done = subprocess.run(
            [bin / "flwr", "run", folder, "loop", "--stream", "--run-config", text], timeout=PATIENCE,
            capture_output=True, text=True, env=environment(python, homes["server"]), cwd=tmp_path,
        )  # fmt: skip
    logs = "\n".join(path.read_text()[-5_000:] for path in tmp_path.glob("*.log"))
    assert (output / "adapter").is_dir(), done.stdout[-10_000:] + done.stderr[-5_000:] + logs
    clients, shared = in_loop(settings, data)
    clients.save(tmp_path / "looped", shared)
    served, looped = (
        load_file(path / "adapter_model.safetensors") for path in (output / "adapter", tmp_path / "looped")
    )
    assert served.keys() == looped.keys() and len(served) == 2 * len(shared.B)
    assert all(torch.equal(served[name], value) for name, value in looped.items())
    assert any(value.any() for name, value in served.items() if "lora_B" in name)
    reports = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert [sorted(report["clients"]) for report in reports] == [sorted(data)] * 2
    # a node keeps the app, and neither a row outside of its file nor a trainer's folder
    for name in data:
        left = [path for path in homes[name].rglob("*") if path.is_file()]
        assert any(path.name == "task.py" for path in left), left
        assert not any(b"has row" in path.read_bytes() for path in left), left
        assert {path.suffix for path in left} <= {".py", ".toml", ".pyc", ".lock", ""}, left
