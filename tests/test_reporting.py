import csv
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import TrainerControl, TrainerState, TrainingArguments

from posttrain.environment import git_commit
from posttrain.run import report
from posttrain.run.report import RunReport, plot_curves
from posttrain.tables import format_table, wilson_interval


@pytest.fixture
def args(tmp_path):
    token = "hf_" + "x" * 30
    return TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, seed=7, hub_token=token)


def state_at(step, main=True):
    return TrainerState(global_step=step, epoch=step / 10, is_world_process_zero=main)


def run(report, args, start, stop, main=True):
    report.on_train_begin(args, state_at(start, main), TrainerControl())
    for step in range(start + 1, stop + 1):
        logs = {"loss": 1 / step, "rewards/margins": float(step), "epoch": step / 10, "note": "text"}
        if step % 2 == 0:
            logs["eval_loss"] = 2 / step
        report.on_log(args, state_at(step, main), TrainerControl(), logs=logs)
    report.on_train_end(args, state_at(stop, main), TrainerControl())


def read(args):
    with open(args.output_dir + "/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def commit(folder):
    author = ["-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


def test_each_log_is_a_line_with_step_epoch_and_every_number(args):
    run(RunReport(), args, 0, 3)
    rows = read(args)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1] == {"step": 2, "epoch": 0.2, "loss": 0.5, "rewards/margins": 2.0, "eval_loss": 1.0}


def test_resuming_drops_the_lines_beyond_the_step_and_a_broken_last_one(args):
    run(RunReport(), args, 0, 5)
    straight = read(args)
    with open(args.output_dir + "/metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    run(RunReport(), args, 3, 5)
    assert read(args) == straight
    with open(args.output_dir + "/metrics.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4", "5"]


def test_a_fresh_run_drops_what_an_earlier_one_left_but_keeps_its_own_first_evaluation(args):
    run(RunReport(), args, 0, 5)
    report = RunReport()
    report.on_log(args, state_at(0), TrainerControl(), logs={"eval_loss": 3.0})
    run(report, args, 0, 1)
    assert [row["step"] for row in read(args)] == [0, 1]
    assert read(args)[0]["eval_loss"] == 3.0


def test_a_diverged_loss_stays_visible(args):
    report = RunReport()
    report.on_train_begin(args, state_at(0), TrainerControl())
    report.on_log(args, state_at(1), TrainerControl(), logs={"loss": float("nan")})
    report.on_train_end(args, state_at(1), TrainerControl())
    assert math.isnan(read(args)[0]["loss"])


def test_csv_has_a_column_per_metric(args):
    run(RunReport(), args, 0, 2)
    with open(args.output_dir + "/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["eval_loss"] == "" and float(rows[1]["eval_loss"]) == 1.0
    assert list(rows[0])[:2] == ["step", "epoch"]


def test_only_the_main_process_writes(args, tmp_path):
    run(RunReport(), args, 0, 2, main=False)
    assert not (tmp_path / "run").exists()


def test_curves_are_drawn_without_touching_the_global_backend(args, tmp_path, monkeypatch, curves):
    pytest.importorskip("matplotlib")
    # other libraries may have imported it by now
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    run(RunReport(), args, 0, 4)
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.slow
def test_panels_beyond_the_limit_leave_out_the_least_telling_metrics(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, label, **kwargs: titles.append(label))
    names = [f"logits/{i}" for i in range(12)] + ["rdpo/kappa", "rewards/margins", "eval_loss", "loss"]
    rows = [{"step": step, "epoch": 0.1, **dict.fromkeys(names, 1.0)} for step in (1, 2)]
    plot_curves(rows, tmp_path / "curves.png")
    assert titles[:4] == ["loss", "rewards/margins", "rdpo/kappa", "logits/0"] and len(titles) == 12


def test_several_evaluation_sets_share_the_panel_of_their_metric(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    titles, lines, plot = [], [], Axes.plot

    def note(self, *points, label, **kwargs):
        lines.append(label)
        return plot(self, *points, label=label, **kwargs)

    monkeypatch.setattr(Axes, "set_title", lambda self, label, **kwargs: titles.append(label))
    monkeypatch.setattr(Axes, "plot", note)
    names = ["loss", "rewards/margins", "eval_easy_loss", "eval_hard_loss", "eval_hard_rewards/margins", "eval_own"]
    plot_curves([{"step": 1, **dict.fromkeys(names, 1.0)}], tmp_path / "curves.png")
    assert titles == ["loss", "rewards/margins", "own"]
    assert lines == ["train", "eval hard", "eval easy", "train", "eval hard", "eval"]


def test_curves_of_nothing_are_not_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"step": 1, "epoch": 0.1, "train_runtime": 3.0, "loss": float("nan")}
    plot_curves([row], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError(), "pip install 'posttrain[plots]'"),
        (OSError("disk full"), "could not be written: disk full"),
    ],
)
def test_a_run_survives_a_plot_that_fails_and_says_so_in_a_line(args, monkeypatch, error, message):
    lines = []

    def note(text, *values):
        lines.append(text % values)

    monkeypatch.setattr(report, "get_logger", lambda: SimpleNamespace(info=note, warning=note))

    def fail(rows, path):
        raise error

    monkeypatch.setattr(report, "plot_curves", fail)
    run(RunReport(), args, 0, 1)
    assert len(lines) == 1 and message in lines[0]


def test_resolved_config_holds_settings_versions_and_commit_but_no_secret(args, tmp_path, monkeypatch):
    commit(tmp_path)
    monkeypatch.chdir(tmp_path)
    sections = {
        "model": {"model_name_or_path": tmp_path, "dtype": torch.float32, "lora_r": 16},
        "env": {"WANDB_API_KEY": "abc", "URL": "https://me:pw@host/x", "X": "hf_" + "y" * 30},
    }
    RunReport(sections).on_train_begin(args, state_at(0), TrainerControl())
    text = (tmp_path / "run" / "resolved_config.yaml").read_text()
    config = yaml.safe_load(text)
    assert config["training"]["seed"] == 7
    assert config["model"] == {"model_name_or_path": str(tmp_path), "dtype": "torch.float32", "lora_r": 16}
    assert config["versions"]["torch"] == torch.__version__
    assert config["device"].startswith("cpu") and config["processes"] == 1
    assert len(config["git"]) == 40
    for secret in ("hf_", "abc", "me:pw", "hub_token"):
        assert secret not in text


def test_git_commit_says_dirty_and_is_none_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    (tmp_path / "a").write_text("1")
    commit(tmp_path)
    assert len(git_commit()) == 40
    (tmp_path / "a").write_text("2")
    assert git_commit().endswith("-dirty")


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I, method 3: 81/263 and 0/20.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    low, high = wilson_interval(20, 20)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(0, 20))
    with pytest.raises(ValueError, match="successes=3, n=2"):
        wilson_interval(3, 2)


def test_tables_line_up():
    table = format_table(("method", "n"), [("a", 1), ("longer", 200)])
    assert table.splitlines() == [
        "| method |   n |",
        "| ------ | --: |",
        "| a      |   1 |",
        "| longer | 200 |",
    ]
