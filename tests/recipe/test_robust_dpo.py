"""Every shipped config through the real command, with the model and the data replaced by tiny ones."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from posttrain.paths import configs_dir, recipes_dir
from tests.conftest import make_pairs

BIN = Path(sys.executable).parent
SMALL = [
    "--max_train_rows", "8", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1",
    "--max_length", "128", "--max_steps", "2", "--logging_steps", "1",
]  # fmt: skip


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    make_pairs(16).to_json(path)
    return path


def launch(accelerate, config, folder, *settings):
    """The recipe's process, run from a folder that is not the repository."""
    command = [
        BIN / "accelerate", "launch", "--config_file", configs_dir() / "accelerate" / f"{accelerate}.yaml",
        recipes_dir() / "robust_dpo.py", "--config", configs_dir() / "robust_dpo" / f"{config}.yaml",
        "--model_name_or_path", "embedded:tiny", "--output_dir", folder / "run", *settings,
    ]  # fmt: skip
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(recipes_dir().parent),
    }
    # set, it would keep accelerate from saying how many threads it takes
    environment.pop("OMP_NUM_THREADS", None)
    # Ranks that wait for each other wait for ever.
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def train_two_steps(accelerate, config, folder, pairs, *settings):
    done = launch(accelerate, config, folder, "--dataset_name", pairs, *SMALL, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    if accelerate == "cpu":
        # lines that upstream libraries print on every CPU, whatever the run
        noises = ("Setting accelerator to CPU", "gemm_4bit_forward", "FutureWarning", "accelerate launch", "OMP_NUM")
        for noise in noises:
            assert noise not in done.stdout + done.stderr
    run = folder / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    return run, rows


def reload(run):
    """The logits of the saved adapter or model on one process."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapter = (run / "adapter_config.json").is_file()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(run)
    return model(torch.arange(1, 9)[None]).logits


@pytest.mark.slow
def test_the_cpu_config_trains_an_adapter_by_its_launch_line_and_is_quiet(tmp_path, pairs):
    run, _ = train_two_steps("cpu", "cpu", tmp_path, pairs)
    assert reload(run).isfinite().all()


def test_the_cpu_config_trains_an_adapter_that_plain_peft_loads(tmp_path, pairs, monkeypatch, capsys):
    run = tmp_path / "run"
    config = configs_dir() / "robust_dpo" / "cpu.yaml"
    given = ["--config", config, "--model_name_or_path", "embedded:tiny", "--output_dir", run, "--dataset_name", pairs]
    given += ["--flip_rate", "0.2", *SMALL]
    monkeypatch.setattr(sys, "argv", ["robust_dpo.py", *map(str, given)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(recipes_dir() / "robust_dpo.py"), run_name="__main__")
    assert caught.value.code == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in rows) == 2
    assert reload(run).isfinite().all()
    settings = yaml.safe_load((run / "resolved_config.yaml").read_text())
    assert settings["training"]["flip_rate"] == 0.2 and settings["training"]["pair_loss"] == "rdpo"
    assert settings["data"]["dataset_name"] == str(pairs) and settings["model"]["lora_r"] == 16
    assert "2403.00409" in (run / "README.md").read_text()


@pytest.mark.slow
def test_the_gpu_config_evaluates_and_trains_an_adapter(tmp_path, pairs):
    # The machine under test may have no GPU; everything but the device is the config's own.
    run, rows = train_two_steps(
        "cpu", "single_gpu", tmp_path, pairs, "--eval_dataset_name", pairs, "--eval_steps", "1", "--max_eval_rows", "4"
    )
    assert reload(run).isfinite().all()
    assert sum("eval_rewards/accuracies" in row for row in rows) >= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "error: model_name_or_path is not set; give it in the config file or as --model_name_or_path VALUE."),
        (["--model_name_or_path", "embedded:tiny"], "error: dataset_name is not set;"),
        (
            ["--model_name_or_path", "embedded:tiny", "--dataset_name", "PAIRS", "--eval_strategy", "epoch"],
            "has no splits. Set eval_dataset_name to another file, or test_split_size to",
        ),
    ],
)
def test_what_is_missing_is_named(settings, message, pairs, monkeypatch, capsys):
    arguments = [str(pairs) if setting == "PAIRS" else setting for setting in settings]
    monkeypatch.setattr(sys, "argv", ["robust_dpo.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(recipes_dir() / "robust_dpo.py"), run_name="__main__")
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def private(tmp_path, monkeypatch, capsys):
    """Runs the recipe with its private config on 16 pairs of four people: exit code, stdout and stderr."""
    pytest.importorskip("dp_accounting")
    monkeypatch.chdir(tmp_path)
    make_pairs(16, user=[f"u{row % 4}" for row in range(16)]).to_json(tmp_path / "pairs.jsonl")

    def run(*settings):
        given = [
            "--config", configs_dir() / "robust_dpo" / "private.yaml", "--model_name_or_path", "embedded:tiny",
            "--dataset_name", "pairs.jsonl", "--output_dir", "run", "--max_steps", "2", "--target_delta", "1e-3",
            "--expected_batch_size", "8", "--disable_tqdm", "true", "--save_strategy", "no", *settings,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["robust_dpo.py", *map(str, given)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(recipes_dir() / "robust_dpo.py"), run_name="__main__")
        said = capsys.readouterr()
        return caught.value.code, said.out, said.err

    return run


def test_the_private_config_trains_an_adapter_with_a_promise_to_people(private, tmp_path):
    people = ("--privacy_unit_column", "user", "--rows_per_unit", "2", "--expected_batch_size", "2")
    code, out, err = private(*people)
    assert code == 0 and "Saved to run" in out, err
    run = tmp_path / "run"
    promise = json.loads((run / "posttrain_privacy.json").read_text())
    assert (promise["column"], promise["units"], promise["steps"], promise["rows_per_unit"]) == ("user", 4, 2, 2)
    assert 0 < promise["epsilon"] <= 8 and promise["accountant_version"]
    card = (run / "README.md").read_text()
    assert "differentially private" in card and "1607.00133" in card and "2403.00409" in card
    assert "curves.png" not in card and promise["accountant_version"] in card
    settings = yaml.safe_load((run / "resolved_config.yaml").read_text())
    assert settings["privacy"]["privacy_unit_column"] == "user" and settings["training"]["max_grad_norm"] == 0.0
    assert reload(run).isfinite().all()


def test_a_private_dry_run_tells_units_noise_and_steps(private, tmp_path):
    code, out, err = private("--dry_run", "true")
    assert code == 0 and not (tmp_path / "run").exists(), err
    lines = [line for line in out.splitlines() if len(line.split()) > 1 and not line.startswith(" ")]
    told = dict(line.rsplit(maxsplit=1) for line in lines)
    assert (told["units of privacy"], told["most units of a step"], told["steps"]) == ("16", "16", "2")
    assert told["most pairs per step"] == "16" and float(told["noise_multiplier"]) > 0
    assert float(told["epsilon"]) == pytest.approx(8, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (["--target_epsilon", "null"], 2, "target_epsilon and noise_multiplier are both null"),
        (["--privacy_unit_column", "person"], 3, "train_dataset has no column person, which privacy_unit_column names"),
        (["--privacy_unit_column", "person", "--dry_run", "true"], 3, "train_dataset has no column person"),
        (["--reduction", "dr_dpo", "--pair_loss", "dpo"], 2, "reduction is dr_dpo, which weighs each pair by the"),
        (["--use_peft", "false"], 2, "there is no LoRA to train"),
        (["--expected_batch_size", "17"], 2, "expected_batch_size is 17, and the training data has 16 units"),
    ],
)
def test_what_a_private_run_refuses_is_said_before_a_model_loads(private, settings, code, message, tmp_path):
    ended, _, err = private(*settings)
    assert ended == code and message in err and not (tmp_path / "run").exists(), err
