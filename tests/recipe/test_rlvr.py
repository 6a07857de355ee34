"""The recipes with verifiable rewards, with the model and the data replaced by tiny ones."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from posttrain import HPTConfig, QAEConfig, quiet
from posttrain.cli import main
from posttrain.config import ModelArguments, parse
from posttrain.errors import ConfigError
from posttrain.models import resolve_model
from posttrain.paths import configs_dir, recipes_dir
from posttrain.recipe.tasks import TaskArguments

BIN = Path(sys.executable).parent
METHODS = {"qae": QAEConfig, "hpt": HPTConfig}
TASKS = "generated:arithmetic?n=16&operands=2-2&digits=1-1"
# of what a random model writes, about a half
PARITY = "def parity(completion_ids, **columns):\n    return [float(sum(ids) % 2) for ids in completion_ids]\n"


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """Runs a recipe in this process, from a folder with a reward of the user's own: exit code, stdout, stderr."""
    (tmp_path / "parity_reward.py").write_text(PARITY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "parity_reward", raising=False)

    def run(method, *config, **given):
        defaults = {"model_name_or_path": "embedded:tiny", "output_dir": "run", "disable_tqdm": "true"}
        flags = []
        for name, value in (defaults | given).items():
            flags += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
        monkeypatch.setattr(sys, "argv", [f"{method}.py", *config, *flags])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(recipes_dir() / f"{method}.py"), run_name="__main__")
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return caught.value.code, said.out, said.err

    return run


def shipped(method, config):
    return "--config", str(configs_dir() / method / f"{config}.yaml")


SMALL = {
    "dataset_name": TASKS, "max_steps": 2, "max_completion_length": 32, "gradient_accumulation_steps": 2,
    "logging_steps": 1,
}  # fmt: skip


@pytest.mark.core("hpt")
@pytest.mark.parametrize("method", METHODS)
def test_the_cpu_config_trains_an_adapter_that_plain_peft_loads(recipe, tmp_path, method):
    rewards = ["maths_answer", "parity_reward:parity"]
    code, out, err = recipe(
        method, *shipped(method, "cpu"), **SMALL, reward_funcs=rewards, allow_code=["parity_reward"]
    )
    assert code == 0 and "Saved to run" in out, err
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    own = {"qae": "qae/frac_zero_advantage", "hpt": "hpt/frac_sft_prompts"}[method]
    assert len(steps) == 2 and all(0 <= row[own] <= 1 for row in steps)
    assert all("rewards/maths_answer/mean" in row and "rewards/parity/mean" in row for row in steps)

    tokens = torch.arange(1, 9)[None]
    model = AutoPeftModelForCausalLM.from_pretrained(run)
    base = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))
    trained = model(tokens).logits
    assert trained.isfinite().all() and (trained - base(tokens).logits).abs().max() > 1e-6

    settings = yaml.safe_load((run / "resolved_config.yaml").read_text())
    assert settings["tasks"]["dataset_name"] == TASKS and settings["tasks"]["reward_funcs"] == rewards
    assert settings["model"]["lora_r"] == 16 and settings["training"]["num_generations"] == 4
    assert {"qae": "2509.22611", "hpt": "2509.04419"}[method] in (run / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_config_is_valid(method):
    from posttrain.rewards import get_rewards

    prompts = {}
    for path in sorted((configs_dir() / method).glob("*.yaml")):
        tasks, model, args = parse((TaskArguments, ModelArguments, METHODS[method]), ["--config", str(path)])
        get_rewards(tasks.reward_funcs)
        assert tasks.dataset_name and model.model_name_or_path
        prompts[path.stem] = args.generation_batch_size // args.num_generations
    assert prompts["cpu"] == 4
    # on eight GPUs, as its comment says
    assert 8 * prompts["zero3"] == 128


@pytest.mark.slow
def test_a_dry_run_tells_what_would_run_and_writes_nothing(recipe, tmp_path):
    tasks = "generated:arithmetic?n=21&operands=2-2&digits=1-1"
    given = {"dataset_name": tasks, "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    code, out, err = recipe("hpt", *shipped("hpt", "cpu"), **given, dry_run="true", max_completion_length=40)
    assert code == 0, err
    facts = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1 and line[42:43] == " ")
    # 8 rollouts are 2 prompts; 21 tasks are 10 whole generations
    expected = {"training tasks": "21", "prompts per generation": "2", "rollouts per generation": "8", "steps": "20"}
    assert {name: facts[name] for name in expected} == expected
    model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))
    linears = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    rank = 16 * sum(module.in_features + module.out_features for module in linears if module is not model.lm_head)
    assert facts["trainable parameters"] == f"{rank:,}"
    assert "First prompt:\n<|im_start|>user\nWhat is " in out and "First demonstration:\n" in out
    assert not (tmp_path / "run").exists()


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [{"prompt": f"{i} + 1 =", "demonstration": f"#### {i + 1}", "gold": str(i + 1)} for i in range(8)]
WITHOUT = [{"prompt": row["prompt"], "gold": row["gold"]} for row in ROWS]
EMPTY = [ROWS[0], ROWS[1] | {"demonstration": " "}, *ROWS[2:]]
BAD_GOLD = [*ROWS[:3], ROWS[3] | {"gold": "about four"}, *ROWS[4:]]
REFUSED = [
    ("qae", {"quantile": 1.5}, ROWS, 2, "quantile is 1.5; it must lie in (0, 1)"),
    ("qae", {"quantile": 0}, ROWS, 2, "(quantile: command line)"),
    ("hpt", {"gamma": 1.5}, ROWS, 2, "gamma is 1.5; it is a share of rollouts, in [0, 1]"),
    ("hpt", {"reward_funcs": "maths_anser"}, ROWS, 2, "'maths_anser' is not known. Did you mean 'maths_answer'?"),
    ("hpt", {"success_reward": "format"}, ROWS, 2, "success_reward is 'format'; it must be one of maths_answer."),
    ("hpt", {"demonstration_column": "solution"}, ROWS, 3, "column 'solution' of columns="),
    ("hpt", {"dataset_name": ""}, ROWS, 2, "dataset_name is not set; give it in the config file or as --dataset_name"),
    ("hpt", {"eval_strategy": "steps", "eval_steps": 1}, ROWS, 2, "the file tasks.jsonl has no splits."),
    ("hpt", {}, WITHOUT, 3, "no columns for prompt and demonstration; found ['prompt', 'gold']"),
    ("hpt", {}, EMPTY, 3, "line 2: 'demonstration', the demonstration, is an empty text"),
    ("hpt", {"max_completion_length": 4}, ROWS, 3, "8 of 8 demonstrations of train_dataset are longer than"),
    ("qae", {}, BAD_GOLD, 3, "train_dataset, row 4: the gold answer 'about four' in column 'gold' cannot be used by"),
    ("qae", {"reward_funcs": "gym"}, ROWS, 3, "train_dataset: column 'gym_task' with the gold answers is missing"),
    ("qae", {}, ROWS[:3], 3, "train_dataset has 3 rows, and a generation takes 4 prompts"),
]


# both roads for a setting and for rows; one for the others
MODES = [("train", *case) for case in REFUSED] + [("dry run", *REFUSED[i]) for i in (0, 8, 10, 11)]


@pytest.mark.parametrize(
    ("mode", "method", "given", "rows", "code", "message"), MODES, ids=[f"{m[0]}-{m[-1][:40]}" for m in MODES]
)
def test_what_cannot_be_trained_ends_with_its_code(recipe, tmp_path, mode, method, given, rows, code, message):
    (tmp_path / "tasks.jsonl").write_text(lines(rows))
    given = {"dataset_name": "tasks.jsonl", "reward_funcs": "maths_answer?engine=numbers"} | given
    if mode == "dry run":
        given["dry_run"] = "true"
    found, _, err = recipe(method, *shipped(method, "cpu"), **given)
    assert (found, message in err) == (code, True), err
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_success_may_be_read_from_the_second_reward_of_a_name(tmp_path):
    from posttrain.recipe.tasks import check_tasks
    from posttrain.rewards import get_rewards

    def check(name):
        batch = dict(num_generations=4, per_device_train_batch_size=4)
        args = QAEConfig(str(tmp_path), success_reward=name, **batch)
        check_tasks(args, get_rewards(["format", "format?template=boxed"]), None, None)

    check("format_2")
    with pytest.raises(ConfigError, match="success_reward is 'format_3'; it must be one of format, format_2."):
        check("format_3")


def test_columns_of_other_names_are_read_and_qae_needs_no_demonstration(recipe, tmp_path):
    rows = [{"task": row["prompt"], "result": row["gold"]} for row in ROWS]
    (tmp_path / "tasks.jsonl").write_text(lines(rows))
    columns = {"prompt_column": "task", "gold_column": "result"}
    given = {"dataset_name": "tasks.jsonl", "reward_funcs": "maths_answer?engine=numbers", "dry_run": "true"}
    code, out, err = recipe("qae", *shipped("qae", "cpu"), **given, **columns)
    assert code == 0, err
    assert "First prompt:\n<|im_start|>user\n0 + 1 =" in out and "First gold:\n1" in out


def test_prompts_without_a_demonstration_are_left_to_their_rollouts_where_asked_for(recipe, tmp_path):
    (tmp_path / "tasks.jsonl").write_text(lines(EMPTY))
    given = {"dataset_name": "tasks.jsonl", "reward_funcs": "maths_answer?engine=numbers", "dry_run": "true"}
    code, out, err = recipe("hpt", *shipped("hpt", "cpu"), **given, empty_demonstrations="rollouts")
    assert code == 0 and "First demonstration:\n#### 1" in out, err


def test_the_command_line_knows_the_recipes(monkeypatch, capsys):
    monkeypatch.setattr(quiet, "quiet_libraries", lambda: None)
    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    for method in METHODS:
        number = next(i for i, line in enumerate(listed) if line.startswith(f"{method} "))
        assert listed[number + 1].strip() == "configs: cpu, single_gpu, zero3"
    launched = []

    def launch(command, env):
        launched.append(command)
        return 2

    monkeypatch.setattr("posttrain.cli._supervised.run", launch)
    assert main(["train", "hpt", "--config", "cpu", "--launch", "cpu", "--gamma", "2"]) == 2
    assert "recipes/hpt.py --config " in capsys.readouterr().out
    assert launched[0][-5].endswith("recipes/hpt.py") and launched[0][-2:] == ["--gamma", "2"]
