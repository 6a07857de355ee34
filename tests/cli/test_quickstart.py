import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from posttrain import quiet
from posttrain.cli import main, quickstart
from posttrain.errors import DivergedError
from posttrain.run import report

METHODS = ("dpo_clean", "dpo", "rdpo", "dr_dpo")


SHORT = dataclasses.replace(quickstart.FAST, steps=3, held_out=10)


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory):
    """The folder and the printed lines of a run in this process, of fewer steps than --fast takes."""
    folder, out = tmp_path_factory.mktemp("quickstart"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        # it would silence them for the tests that follow, too
        patch.setattr(quiet, "quiet_libraries", lambda: None)
        patch.setattr(quickstart, "FAST", SHORT)
        # other fixtures' runs draw none
        patch.setattr(report, "plot_curves", inspect.unwrap(report.plot_curves))
        patch.setenv("POSTTRAIN_CACHE", str(folder / "cache"))
        # as a user would: the lines it prints must not depend on where it ran
        patch.chdir(folder)
        assert main(["quickstart", "--fast", "--output", "out", "--seed", "3"]) == 0
    return folder / "out", out.getvalue()


def check_table(printed):
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    assert [(row[0].strip(), row[1].strip()) for row in rows[2:]] == [
        ("base model", "-"),
        ("DPO", "clean"),
        ("DPO", "flipped"),
        ("rDPO", "flipped"),
        ("Dr. DPO", "flipped"),
    ]
    assert "random weights" in printed


@pytest.mark.slow
def test_console_shows_one_table(fast_run):
    check_table(fast_run[1])


@pytest.mark.slow
def test_console_is_quiet_and_shows_one_table(tmp_path):
    command = [sys.executable, "-m", "posttrain", "quickstart", "--fast", "--output", "out", "--seed", "3"]
    environment = os.environ | {"POSTTRAIN_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path.cwd())}
    environment.pop("POSTTRAIN_LOG", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    check_table(done.stdout)


@pytest.mark.slow
def test_results_hold_figures_settings_versions_and_hardware(fast_run):
    report = json.loads((fast_run[0] / "results.json").read_text())
    assert [result["method"] for result in report["results"]] == ["base", *METHODS]
    for result in report["results"]:
        low, high = result["interval"]
        assert 0 <= low <= result["accuracy"] <= high <= 1
    assert report["settings"]["seed"] == 3 and report["settings"]["flip_rate"] == 0.3
    assert report["versions"]["torch"] == torch.__version__
    assert report["hardware"]["device"].startswith(("cpu", "cuda"))
    assert report["seconds"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_each_method_leaves_a_complete_run_folder(fast_run, method):
    folder = fast_run[0] / method
    expected = {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "metrics.csv", "README.md"}
    assert expected | {"resolved_config.yaml", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in steps) == report_steps(fast_run)
    config = yaml.safe_load((folder / "resolved_config.yaml").read_text())
    for name, value in quickstart.METHODS[method].settings.items():
        assert config["training"][name] == value
    assert config["data"]["labels"] == ("clean" if method == "dpo_clean" else "flipped")
    card = (folder / "README.md").read_text()
    assert "embedded:tiny" in card and "eval_accuracy" in card
    assert str(fast_run[0].parent) not in card


def report_steps(fast_run):
    return json.loads((fast_run[0] / "results.json").read_text())["settings"]["steps"]


@pytest.mark.slow
def test_methods_and_labels_change_the_adapter_from_one_common_start(fast_run):
    adapters = {method: load_file(fast_run[0] / method / "adapter_model.safetensors") for method in METHODS}
    first_loss = {
        method: json.loads((fast_run[0] / method / "metrics.jsonl").read_text().splitlines()[0]) for method in METHODS
    }
    # At step 0 policy and reference are the same, whatever the method: every pair's margin is zero.
    for row in first_loss.values():
        assert row["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    name = next(name for name in adapters["dpo"] if "lora_B" in name)
    for one in METHODS:
        for other in METHODS:
            assert (one == other) == torch.equal(adapters[one][name], adapters[other][name])


@pytest.mark.slow
def test_the_printed_lines_load_the_rdpo_adapter_with_plain_peft(fast_run, tmp_path, monkeypatch):
    code = re.search(r"Load the rDPO adapter.*?```python\n(.*?)```", fast_run[1], re.DOTALL)[1]
    assert "posttrain" not in re.sub(r'"[^"]*"', "", code)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    assert scope["model"].peft_config["default"].r == 16
    loaded = dict(scope["model"].named_parameters())
    saved = load_file(fast_run[0] / "rdpo" / "adapter_model.safetensors")
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], value) for name, value in saved.items())
    assert len(scope["answer"]) > 0


class _FakeJob:
    """Results without training: DPO on clean labels ranks `accuracy` of the pairs right."""

    accuracy = 0.84

    def __init__(self, scale, seed, output):
        pass

    def base(self):
        return self.train("base")

    def train(self, name):
        return {
            "method": name,
            "title": name,
            "labels": "-",
            "train_seconds": None,
            "accuracy": self.accuracy,
            "interval": (0.0, 1.0),
            "margin": 0.0,
        }

    def loading_lines(self, name):
        return name

    def shared_settings(self):
        return {}

    versions = hardware = shared_settings


def run_with(monkeypatch, output, **changes):
    monkeypatch.setattr(quickstart, "_Job", _FakeJob)
    defaults = {"fast": False, "output": str(output), "seed": 0, "methods": list(METHODS), "verbose": True}
    return quickstart.run(Namespace(**defaults | changes))


def test_a_failed_task_check_is_said_and_exits_non_zero_but_the_table_is_kept(tmp_path, monkeypatch, capsys):
    with pytest.raises(DivergedError, match="task check failed: DPO on clean labels must rank at least 85%") as error:
        run_with(monkeypatch, tmp_path)
    assert error.value.exit_code == 5
    assert "| dpo_clean" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["task_check"]["passed"] is False


def test_the_task_check_passes_at_the_mark_and_is_for_full_runs_with_clean_labels(tmp_path, monkeypatch):
    assert run_with(monkeypatch, tmp_path, fast=True) == 0
    assert run_with(monkeypatch, tmp_path, methods=["rdpo"]) == 0
    monkeypatch.setattr(_FakeJob, "accuracy", 0.85)
    assert run_with(monkeypatch, tmp_path) == 0


def test_an_unwritable_output_folder_is_an_issue_of_the_environment(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["quickstart", "--fast", "--output", str(tmp_path / "file" / "out")]) == 4
    assert "cannot be written to" in capsys.readouterr().err


def test_held_out_lists_never_appear_in_training():
    from posttrain.data.generated import reverse_list_pairs

    for scale in (quickstart.FULL, quickstart.FAST):
        train = reverse_list_pairs(scale.steps * scale.batch_size, 0)
        held_out = reverse_list_pairs(scale.held_out, 1, exclude=train)
        words = [{frozenset(row["prompt"][1]["content"].split(", ")) for row in rows} for rows in (train, held_out)]
        assert not words[0] & words[1] and len(words[1]) == scale.held_out
