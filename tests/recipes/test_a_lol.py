"""The recipe with scored answers and its shipped configs, with the model and the data replaced by tiny ones."""

import json
import runpy
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from posttrain import ALoLConfig
from posttrain.answers import ScoredArguments
from posttrain.cli import main
from posttrain.config import ModelArguments, parse
from posttrain.models import resolve_model
from posttrain.paths import configs_dir, recipes_dir

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
    ({"reward_column": "score"}, ROWS, 3, "column 'score' of columns="),
    ({"eval_strategy": "steps", "eval_steps": 1}, ROWS, 2, "the file answers.jsonl has no splits."),
]


@pytest.mark.parametrize("mode", ["train", "dry run"])
@pytest.mark.parametrize(("given", "rows", "code", "message"), REFUSED, ids=[row[-1][:40] for row in REFUSED])
def test_what_cannot_be_trained_ends_with_its_code(recipe, tmp_path, mode, given, rows, code, message):
    found, _, err = recipe(rows=rows, **given, **({"dry_run": "true"} if mode == "dry run" else {}))
    assert (found, message in err) == (code, True), err
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_files_on_other_scales_are_told_apart(recipe, tmp_path):
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row | {"reward": 4.0}) + "\n" for row in ROWS))
    code, _, err = recipe(more_datasets="more.jsonl", dry_run="true")
    assert code == 3 and "the rewards of these files are on different scales" in err
    code, out, err = recipe(more_datasets="more.jsonl", dry_run="true", same_scale="true")
    assert code == 0 and "32" in out, err


def test_columns_of_other_names_and_a_reward_function_of_ones_own(recipe):
    rows = [{"question": row["prompt"], "said": row["completion"]} for row in ROWS]
    columns = {"prompt_column": "question", "completion_column": "said"}
    code, out, err = recipe(rows=rows, **columns, reward_func="brief_reward:brief")
    assert code == 0 and "Saved to run" in out, err


def test_stats_draw_rewards(recipe, tmp_path, capsys):
    recipe(dry_run="true")
    assert main(["data", "stats", "answers.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "rewards of 16 answers" in out and "advantages over their mean" in out
    assert main(["data", "stats", "answers.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rewards"]["max"] == 1.0
