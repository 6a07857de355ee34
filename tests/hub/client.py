"""The real hub client in a process of its own, as it reads its settings at import: a call a line in.

`python -m tests.hub.client` with HF_ENDPOINT and the rest already set. Each line is {"call": NAME, "kwargs": {...}}.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from transformers.utils import PushInProgress

from posttrain import cli, hub
from posttrain.errors import PosttrainError
from posttrain.log import get_logger

# Short, and two of them: each call has three tries
DELAYS = (0.05, 0.05)


def push(folder, repo="me/run", base="org/base", base_is_given=True, private=None, token=None, **kwargs):
    destination = hub.open_repository(
        repo, base, base_is_given=base_is_given, private=private, token=token, delays=DELAYS
    )
    pushed = hub.push_folder(folder, destination, token=token, delays=DELAYS, **kwargs)
    return {"files": pushed.files, "commit": pushed.commit.commit_url, **dataclasses.asdict(destination)}


def preflight(model="org/base", is_adapter=None, **settings):
    found = hub.preflight(arguments(**settings), model, is_adapter=is_adapter, delays=DELAYS)
    return found and dataclasses.asdict(found)


def push_run(folder, blocking=True, **settings):
    running = trainer(folder, **settings)
    commit = hub.push_run(running, "End of training", blocking=blocking, delays=DELAYS)
    if not blocking:
        commit = commit.result(timeout=60)
    return commit and commit.commit_url


def push_checkpoints(folder, checkpoints, always=False, **settings):
    """Push one checkpoint after another without waiting; then wait for all of them."""
    running = trainer(folder, hub_always_push=always, **settings)
    running.hub_destination = hub.open_repository("me/run", "org/base", delays=DELAYS)
    for name in checkpoints:
        running.state.global_step = int(name.split("-")[1])
        hub.push_checkpoint(running, Path(folder) / name, delays=DELAYS)
    if running.push_in_progress:
        running.push_in_progress.wait_until_done()
    return isinstance(running.push_in_progress, PushInProgress)


def command(arguments, token=None):
    """The command line, with this token in the place of the environment's."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        if token:
            stack.enter_context(mock.patch.dict(os.environ, HF_TOKEN=token))
        code = cli.main(arguments)
    return {"returncode": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


def arguments(**settings):
    defaults = {
        "push_to_hub": True,
        "hub_model_id": "me/run",
        "hub_strategy": "every_save",
        "hub_private_repo": None,
        "hub_token": None,
        "hub_revision": None,
        "hub_always_push": False,
        "base_model_id": None,
        "output_dir": "out",
        "world_size": 1,
        "process_index": 0,
    }
    return SimpleNamespace(**(defaults | settings))


def trainer(folder, model="org/base", **settings):
    name = SimpleNamespace(config=SimpleNamespace(_name_or_path=model))
    return SimpleNamespace(
        args=arguments(output_dir=str(folder), **settings),
        model=name,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        state=SimpleNamespace(global_step=0),
        push_in_progress=None,
        is_world_process_zero=lambda: True,
    )


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def main():
    calls = {call.__name__: call for call in (push, preflight, push_run, push_checkpoints, command)}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        log = _Lines()
        get_logger().addHandler(log)
        try:
            answer = {"value": calls[request["call"]](**request["kwargs"])}
        except PosttrainError as error:
            answer = {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
        get_logger().removeHandler(log)
        print(json.dumps(answer | {"log": log.lines}), file=answers, flush=True)


if __name__ == "__main__":
    main()
