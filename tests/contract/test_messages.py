"""The texts of refusals of settings, all in one approved file.

`python -m tests.contract.test_messages --approve` writes the file anew.
"""

import argparse
import difflib
import tempfile
from functools import partial
from pathlib import Path

import pytest

from posttrain.config import parse
from posttrain.errors import PosttrainError
from tests.families import METHODS
from tests.test_config import Toy

APPROVED = Path(__file__).with_name("messages.txt")

FILES = [
    "rate: 0.1\nstep: 3",
    "zzzz: 3",
    "\nwarmup_ratio: 0.1",
    "rate: 1\nmode: a\nrate: 0.2",
    "extra:\n  a: 1\n  a: 2",
    "steps: 2.5",
    "steps: true",
    "steps:",
    "rate: high",
    "ratio: high",
    "rate: [1]",
    "share: maybe",
    "names: {a: 1}",
    "kind: c",
    "mode: off",
    "- 1",
    "rate: [1",
    "rate: 1\nenv: 3",
    "rate: 1\nenv: {'A=B': 4}",
    'env: {WANDB_NAME: "a\\0b"}',
    "rate: 1\nextra: &x {b: *x}",
    "rate: 1\n~: 4",
    "mode: a\n<<: {rate: 1, stepz: 3}",
    "mode: a\nname: 2020-13-45",
    "mode: a\nsteps: " + "1" * 5000,
]

COMMAND_LINES = [
    ["--step", "3"],
    ["--mod", "3"],
    ["--warmup_ratio=0.1"],
    ["--rate", "high"],
    ["--kind", "c"],
    ["fast"],
    ["--rate"],
    ["--config"],
    ["--config", "a", "--config", "b"],
]


def _config(method: str, fields: dict, folder: Path):
    rollouts = dict(num_generations=4, per_device_train_batch_size=16) if method == "policy_gradient" else {}
    METHODS[method].config(str(folder), use_cpu=True, bf16=False, **rollouts | fields)


def _file(text: str, folder: Path):
    path = folder / "run.yaml"
    path.write_text(text)
    parse((Toy,), ["--config", str(path)])


def _command_line(arguments: list[str], folder: Path):
    parse((Toy,), arguments)


CASES = [
    *((method, fields, partial(_config, method)) for method in METHODS for fields in METHODS[method].refused),
    *(("config file", text, _file) for text in FILES),
    *(("command line", arguments, _command_line) for arguments in COMMAND_LINES),
]


def refusal(build, given, folder: Path) -> str:
    """Give the kind and text of the refusal, with FOLDER for the temporary folder."""
    try:
        build(given, folder)
    except PosttrainError as error:
        return f"{type(error).__name__}: {error}".replace(str(folder), "FOLDER")
    raise AssertionError(f"{given!r} is not refused.")


def written(cases, folder: Path) -> str:
    """Give the approved file's text for these cases."""
    blocks = []
    for name, given, build in cases:
        shown = repr(given) if len(repr(given)) < 200 else repr(given)[:80] + "..."
        blocks.append(f"{name}: {shown}\n{refusal(build, given, folder)}\n")
    return "\n".join(blocks)


def difference(approved: str, said: str) -> str:
    """Give the unified diff from the approved text to what is said."""
    return "".join(difflib.unified_diff(approved.splitlines(True), said.splitlines(True), "messages.txt", "said"))


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def test_refusals_have_their_approved_texts(tmp_path):
    change = difference(APPROVED.read_text(encoding="utf-8"), written(CASES, tmp_path))
    assert not change, f"`python -m tests.contract.test_messages --approve` takes this over:\n{change}"


def test_a_changed_text_is_shown_as_a_difference(tmp_path):
    def renamed(given, folder):
        try:
            _config("robust_dpo", given, folder)
        except PosttrainError as error:
            raise type(error)(str(error).replace("flip_rate", "flips")) from error

    approved = APPROVED.read_text(encoding="utf-8")
    said = written([("robust_dpo", METHODS["robust_dpo"].refused[0], renamed), *CASES[1:]], tmp_path)
    assert "-ConfigError: flip_rate is" in difference(approved, said)
    assert "+ConfigError: flips is" in difference(approved, said)


def test_a_setting_that_is_taken_is_no_refusal(tmp_path):
    with pytest.raises(AssertionError, match="is not refused"):
        refusal(partial(_config, "robust_dpo"), dict(flip_rate=0.1), tmp_path)


def test_each_method_has_refusals():
    assert all(method.refused for method in METHODS.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the texts of refusals with the approved file.")
    parser.add_argument("--approve", action="store_true", help="write the file anew")
    approve = parser.parse_args().approve
    with tempfile.TemporaryDirectory() as folder:
        said = written(CASES, Path(folder))
    print(difference(APPROVED.read_text(encoding="utf-8") if APPROVED.exists() else "", said), end="")
    if approve:
        APPROVED.write_text(said, encoding="utf-8")
