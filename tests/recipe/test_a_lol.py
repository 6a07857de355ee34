"""The recipe with scored answers, with the model and the data replaced by tiny ones."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from posttrain import ALoLConfig
from posttrain.cli import main
from posttrain.config import ModelArguments, parse
from posttrain.models import resolve_model
from posttrain.paths import configs_dir, recipes_dir
from posttrain.recipe.scored_answers import ScoredArguments

BIN = Path(sys.executable).parent
ROWS = [
    {"prompt": f"What is {i} + 1?", "completion": f"It is {i + off}.", "reward": reward}
    for i in range(8)
    for off, reward in ((1, 1.0), (2, 0.25))
]
SMALL = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
BRIEF = "def brief(completions, **columns):\n    return [1.0 / ord(text[6]) for text in completions]\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """Runs the recipe in this process: exit code, stdout, stderr."""
    (tmp_path / "brief_reward.py").write_text(BRIEF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(rows=ROWS, **given):
        if rows is not None:
            (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            given = {"dataset_name": "answers.jsonl"} | given
        defaults = {"model_name_or_path": "embedded:tiny", "output_dir": "run", "disable_tqdm": "true"}
        flags = [f for name, value in (defaults | SMALL | given).items() for f in (f"--{name}", str(value))]
        config = str(configs_dir() / "a_lol" / "cpu.yaml")
        monkeypatch.setattr(sys, "argv", ["a_lol.py", "--config", config, *flags])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(recipes_dir() / "a_lol.py"), run_name="__main__")
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return caught.value.code, said.out, said.err

    return run


@pytest.mark.slow
def test_the_cpu_config_trains_an_adapter_that_plain_peft_loads(recipe, tmp_path, curves):
    code, out, err = recipe(rows=None, dataset_name="generated:reverse_list?n=16")
    assert code == 0 and "Saved to run" in out, err
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 and all(row["advantages/positive_share"] == 1 for row in steps)
    tokens = torch.arange(1, 9)[None]
    base = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))
    trained = AutoPeftModelForCausalLM.from_pretrained(run)(tokens).logits
    assert trained.isfinite().all() and (trained - base(tokens).logits).abs().max() > 1e-6
    settings = yaml.safe_load((run / "resolved_config.yaml").read_text())
    assert settings["data"]["dataset_name"] == "generated:reverse_list?n=16"
    assert settings["training"]["variant"] == "a_lol" and "2305.14718" in (run / "README.md").read_text()
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_every_shipped_config_is_valid():
    found = {}
    for path in sorted((configs_dir() / "a_lol").glob("*.yaml")):
        data, model, args = parse((ScoredArguments, ModelArguments, ALoLConfig), ["--config", str(path)])
        assert data.dataset_name and model.model_name_or_path
        found[path.stem] = (args.value, args.clip)
    assert found == {"cpu": ("mean", 0.9), "single_gpu": ("head", 0.9), "zero3": ("mean", 0.9)}


def test_a_dry_run_draws_rewards_and_advantages_and_writes_nothing(recipe, tmp_path):
    code, out, err = recipe(dry_run="true", max_steps=-1, num_train_epochs=1)
    assert code == 0, err
    facts = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line and not line.startswith(" "))
    assert facts["scored answers"].strip() == "16" and facts["of them with a gradient"].strip() == "8"
    assert facts["steps"].strip() == "2"
    assert "     -0.375 to    -0.281        8 ####" in out and "First completion:\nIt is 1." in out
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_what_max_length_leaves(recipe):
    long = {"prompt": "What? " * 60, "completion": "This.", "reward": 1.0}
    code, out, err = recipe(rows=[*ROWS, *[long] * 5], dry_run="true", max_steps=-1, num_train_epochs=1, max_length=100)
    assert code == 0 and "max_length 100 leaves nothing of 5 answers, which are left out and count nowhere" in err, err
    facts = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line and not line.startswith(" "))
    counts = ("scored answers", "of them within max_length", "of them with a gradient", "steps")
    assert [facts[name].strip() for name in counts] == ["21", "16", "8", "2"]
    # rewards of 1 and 0.25 over the mean of those that fit, 0.625
    assert "     -0.375 to    -0.281        8 ####" in out and "      0.281 to     0.375        8 ####" in out


def test_a_dry_run_counts_the_steps_of_full_batches(recipe):
    given = dict(dry_run="true", max_steps=-1, num_train_epochs=1, dataloader_drop_last="true")
    code, out, err = recipe(**given, per_device_train_batch_size=3)
    # 8 answers kept: two full batches of 3, in one step of cpu.yaml's accumulation
    assert code == 0 and "steps                                      1" in out, err
    code, _, err = recipe(**given, per_device_train_batch_size=16)
    assert code == 2 and "8 kept rows fill no batch of 16 (per_device_train_batch_size 16)" in err


REFUSED = [
    ({"variant": "ppo"}, ROWS, 2, "variant is 'ppo'; it must be one of nll, wbc"),
    ({"clip": 0}, ROWS, 2, "clip is 0.0; it must be above 0"),
    ({"kl_beta": 0.1}, ROWS, 2, "kl_beta is 0.1 with variant a_lol, which has no KL part"),
    ({"packing": "true"}, ROWS, 2, "packing is True, which this trainer does not use"),
    ({"value": "head"}, [row | {"reward": 2.0} for row in ROWS], 3, "reward is 2, outside [0, 1]"),
    ({}, [{k: row[k] for k in ("prompt", "completion")} for row in ROWS], 3, "reward"),
    ({}, [*ROWS[:3], ROWS[3] | {"reward": None}], 3, "line 4: reward is missing"),
    ({}, [*ROWS[:3], ROWS[3] | {"reward": float("nan")}], 3, "line 4: reward is nan; it must be a finite number"),
    ({}, [row | {"reward": 0.5} for row in ROWS], 3, "none of 16 answers has a reward above its value"),
    ({"value": "head"}, [row | {"reward": 0.5} for row in ROWS], 3, "all 16 rewards are equal, up to rounding"),
    ({}, [row | {"reward": row["reward"] * 1e40} for row in ROWS], 3, "line 1: reward is 1e+40; numbers beyond 1e+18"),
    ({}, [row | {"reward": row["reward"] * 1e-30} for row in ROWS], 3, "below 1e-12, gradients vanish in fp32"),
    ({"value": "column", "value_column": "reward"}, ROWS, 2, "value_column is 'reward': every answer's value would be"),
    ({"reward_column": "score"}, ROWS, 3, "column 'score' of columns="),
    ({"eval_strategy": "steps", "eval_steps": 1}, ROWS, 2, "the file answers.jsonl has no splits."),
]


# both roads for a setting and for rows; one for the others
MODES = [("train", *case) for case in REFUSED] + [("dry run", *REFUSED[i]) for i in (0, 4, 8, 13)]


@pytest.mark.parametrize(
    ("mode", "given", "rows", "code", "message"), MODES, ids=[f"{m[0]}-{m[-1][:40]}" for m in MODES]
)
def test_what_cannot_be_trained_ends_with_its_code(recipe, tmp_path, mode, given, rows, code, message):
    found, _, err = recipe(rows=rows, **given, **({"dry_run": "true"} if mode == "dry run" else {}))
    assert (found, message in err) == (code, True), err
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_files_on_other_scales_are_told_apart(recipe, tmp_path):
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row | {"reward": 4.0}) + "\n" for row in ROWS))
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    both = {"datasets": "[{path: answers.jsonl}, {path: more.jsonl}]", "dry_run": "true"}
    code, _, err = recipe(rows=None, **both)
    assert code == 3 and "the rewards of these data sets are on different scales (answers.jsonl (training)" in err
    code, out, err = recipe(rows=None, **both, same_scale="true")
    assert code == 0 and "32" in out, err


@pytest.mark.parametrize("mode", ["train", "dry run"])
def test_rewards_for_evaluation_are_on_the_scale_of_those_trained_on(recipe, tmp_path, mode):
    (tmp_path / "held_out.jsonl").write_text(
        "".join(json.dumps(row | {"reward": 90 + i}) + "\n" for i, row in enumerate(ROWS))
    )
    given = {"eval_dataset_name": "held_out.jsonl"} | ({"dry_run": "true"} if mode == "dry run" else {})
    code, _, err = recipe(**given)
    assert code == 3 and not (tmp_path / "run").exists(), err
    shown = "(answers.jsonl (training): 0.25 to 1; held_out.jsonl (evaluation): 90 to 105)"
    assert f"the rewards of these data sets are on different scales {shown}" in err
    if mode == "dry run":
        assert recipe(**given, same_scale="true")[0] == 0


def test_columns_of_other_names_and_a_reward_function_of_ones_own(recipe):
    rows = [{"question": row["prompt"], "said": row["completion"]} for row in ROWS]
    columns = {"prompt_column": "question", "completion_column": "said"}
    code, out, err = recipe(rows=rows, **columns, reward_func="brief_reward:brief", allow_code="brief_reward")
    assert code == 0 and "Saved to run" in out, err


def test_a_dry_run_says_what_a_reward_function_will_tell_and_refuses_one_that_is_none(recipe):
    code, out, err = recipe(
        dry_run="true", max_steps=-1, num_train_epochs=1, reward_func="brief_reward:brief", allow_code="brief_reward"
    )
    assert code == 0 and "known once brief_reward:brief has scored the answers" in out, err
    assert re.search(r"^steps +at most [1-8]$", out, re.MULTILINE) and "advantages" not in out
    code, _, err = recipe(dry_run="true", reward_func="brief_reward:none", allow_code="brief_reward")
    assert code == 2 and "none" in err
    code, _, err = recipe(dry_run="true", value="head", value_targets="generations")
    assert code == 2 and "no reward function is given" in err
    code, _, err = recipe(dry_run="true", value="head", value_folds=9)
    assert code == 3 and "value_folds 9, and train_dataset has 8 different prompts" in err
    code, out, _ = recipe(dry_run="true", max_steps=-1, eos_token="<|im_end|>")
    assert code == 0 and "at most 16: chat_template_path or eos_token" in out


def test_stats_draw_rewards_and_advantages(recipe, tmp_path, capsys):
    def stats(*given):
        code = main(["data", "stats", *given])
        said = capsys.readouterr()
        return code, said.out, said.err

    recipe(dry_run="true")
    code, out, _ = stats("answers.jsonl")
    assert code == 0 and "rewards of 16 answers, mean 0.625" in out
    assert "advantages over their mean, 50.0% of them above 0" in out
    found = json.loads(stats("answers.jsonl", "--json", "--value", "per_prompt")[1])
    assert found["rewards"]["max"] == 1.0 and found["advantages"]["value"] == "per_prompt"
    assert found["advantages"]["max"] == 0.375 and found["advantages"]["positive_share"] == 0.5
    assert [count for *_, count in found["rewards"]["histogram"]] == [8, 0, 0, 0, 0, 0, 0, 8]

    renamed = [{"prompt": r["prompt"], "completion": r["completion"], "mark": r["reward"], "v": 0.5} for r in ROWS]
    recipe(renamed, dry_run="true")
    assert "rewards of" not in stats("answers.jsonl")[1]
    out = stats("answers.jsonl", "--reward-column", "mark", "--value", "column", "--value-column", "v")[1]
    assert "advantages over the column v, 50.0%" in out and "-0.25 to" in out
    assert stats("answers.jsonl", "--value-column", "v")[0] == 2
    code, _, err = stats("answers.jsonl", "--reward-column", "mark", "--value", "column")
    assert code == 3 and "has no column 'baseline'" in err
    assert "rewards of 8 answers" in stats("generated:reverse_list?n=4")[1]
    recipe([*ROWS[:3], ROWS[3] | {"reward": float("nan")}], dry_run="true")
    code, out, _ = stats("answers.jsonl")
    assert code == 0 and "rewards are not drawn: answers.jsonl, line 4: reward is nan" in out
