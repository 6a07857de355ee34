"""A settings file of a stranger runs nothing by itself, and is read in bounded time and memory."""

import base64
import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from posttrain import ALoLConfig, QAEConfig, RobustDPOConfig, log, yaml_text
from posttrain.config import ModelArguments, parse, strangers
from posttrain.config.strangers import VARIABLES
from posttrain.console import complain
from posttrain.errors import ConfigError, DataError
from posttrain.hub.metadata import parse_card
from posttrain.models import check_holds_safetensors
from posttrain.objectives.advantages import leave_one_out_advantage
from posttrain.recipe.tasks import TaskArguments
from posttrain.rewards import get_rewards
from posttrain.run import settings
from posttrain.saved import read_yaml
from posttrain.trainers.offline.a_lol_answers import ALoLAnswers
from posttrain.trainers.policy_gradient.prepare import advantage_function
from posttrain.user_code import import_function

MINE = """
import os, subprocess
from functools import partial
from subprocess import Popen
import pathlib
pathlib.Path(__file__).with_name("IMPORTED").touch()
def brevity(completions, **columns): return [-len(c) for c in completions]
scaled = partial(brevity, factor=2)
class Judge:
    def __call__(self, completions, **columns): return [1.0] * len(completions)
judge = Judge()
"""


def bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def merge_bomb() -> str:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    return "\n".join(lines + [f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]) + "\n"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = f"rewards_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MINE)
    yield name
    sys.modules.pop(name, None)


def read(tmp_path, text: str, *arguments, kinds=(TaskArguments, ModelArguments, QAEConfig)):
    path = tmp_path / "run.yaml"
    own = "num_generations: 4\nuse_cpu: true\n" if QAEConfig in kinds else ""
    path.write_text(text + own)
    return parse(kinds, ["--config", str(path), "--output_dir", str(tmp_path / "out"), *arguments])


def test_a_reward_of_a_module_that_nobody_allowed_is_refused_before_it_is_imported(tmp_path, mine):
    _, _, args = read(tmp_path, f"reward_funcs: ['{mine}:brevity']\n")
    assert args.allow_code == []
    for spec in (
        f"{mine}:brevity",
        {f"{mine}:brevity": {}},
        f"subprocess:Popen?args=touch {tmp_path}/PWNED&shell=true",
    ):
        with pytest.raises(ConfigError, match="which settings alone do not run.*--allow_code"):
            get_rewards([spec], args.allow_code)
    assert not (tmp_path / "IMPORTED").exists() and not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", ["brevity", "judge", "Judge", "scaled"])
def test_what_an_allowed_module_makes_is_run_and_said(tmp_path, mine, caplog, monkeypatch, name):
    monkeypatch.setattr("posttrain.log._logger.propagate", True)
    caplog.set_level(logging.INFO, logger="posttrain")
    _, _, args = read(tmp_path, "seed: 1\n", "--allow_code", mine)
    assert len(get_rewards([f"{mine}:{name}"], args.allow_code)) == 1
    assert f"the module {mine} is imported, and its code runs (allowed by --allow_code)" in caplog.text


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "Popen", "brevity.__globals__.get", "Judge.__init__", "os"]
)
def test_what_is_only_in_the_reach_of_an_allowed_module_is_refused(mine, path):
    with pytest.raises(ConfigError, match="is not made by the module that is allowed"):
        import_function(f"{mine}:{path}", "reward_funcs", [mine])


def test_a_module_beside_the_recipe_needs_no_word_and_one_elsewhere_does(tmp_path, mine, monkeypatch):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "beside_it.py").write_text(
        "def one(completions, **columns): return [1] * len(completions)\n"
    )
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "recipe" / "qae.py"), raising=False)
    sys.path.insert(0, str(tmp_path / "recipe"))
    assert import_function("beside_it:one", "reward_funcs", [])(["a"]) == [1]
    with pytest.raises(ConfigError, match=f"add --allow_code {mine}"):
        import_function(f"{mine}:brevity", "reward_funcs", [])
    # a dotted name is judged by its top, which is not imported for that
    with pytest.raises(ConfigError, match=f"add --allow_code {mine}.sub"):
        import_function(f"{mine}.sub:brevity", "reward_funcs", [])
    assert not (tmp_path / "IMPORTED").exists()


def test_the_recipes_that_are_shipped_are_no_modules_beside_a_recipe(monkeypatch):
    from posttrain.paths import recipes_dir

    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(recipes_dir() / "qae.py"), raising=False)
    monkeypatch.syspath_prepend(str(recipes_dir()))
    with pytest.raises(ConfigError, match="--allow_code hpt"):
        import_function("hpt:main", "reward_funcs", [])


def test_advantages_and_rewards_of_scored_answers_go_by_the_same_rule(tmp_path, mine):
    _, _, args = read(tmp_path, f"advantage: '{mine}:brevity'\n")
    with pytest.raises(ConfigError, match="advantage names.*--allow_code"):
        advantage_function(args)
    args.allow_code = [mine]
    assert advantage_function(args).__name__ == "brevity"
    args.advantage = "leave_one_out"
    assert advantage_function(args) is leave_one_out_advantage
    (scored,) = read(tmp_path, "seed: 1\n", kinds=(ALoLConfig,))
    with pytest.raises(ConfigError, match="--allow_code other"):
        ALoLAnswers(scored, "other:fn")


def test_a_program_that_names_a_function_itself_needs_no_word(mine):
    assert get_rewards([f"{mine}:brevity"])[0](completions=["ab"]) == [-2.0]
    assert ALoLConfig(output_dir="x", use_cpu=True).allow_code is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("allow_code: [subprocess]\n", "run.yaml:1: `allow_code` says which code you trust.*command line"),
        ("seed: 1\ntrust_remote_code: true\n", "run.yaml:2: `trust_remote_code: true` runs code"),
        ("model_init_kwargs: {trust_remote_code: yes}\n", "run.yaml:1: `trust_remote_code: true` runs code"),
        ("datasets: [{path: a, trust_remote_code: 'true'}]\n", "`trust_remote_code: true` runs code"),
        ("model_init_kwargs: '{\"trust_remote_code\": true}'\n", "run.yaml:1: `trust_remote_code: true` runs code"),
        (f"model_init_kwargs: '{'[' * 100_000}'\n", "run.yaml:1: `model_init_kwargs` is nested too deeply"),
        ("attn_implementation: someone/kernel\n", "loads compiled code from the hub"),
        ("model_init_kwargs: {attn_implementation: someone/kernel}\n", "loads compiled code from the hub"),
        ("model_init_kwargs: {use_kernels: true}\n", "`use_kernels: true` runs code"),
        (
            "log_completions: true\nlog_completions_hub_repo: evil/collected\n",
            "run.yaml:2: `log_completions_hub_repo: evil/collected` sends prompts and completions away",
        ),
    ],
)
def test_what_runs_code_of_others_or_sends_completions_away_is_for_the_command_line_alone(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_the_command_line_may_trust_a_models_code_and_send_completions_away(tmp_path):
    sends = "--log_completions", "true", "--log_completions_hub_repo", "me/mine"
    assert read(tmp_path, "log_completions_hub_repo:\n", *sends)[2].log_completions_hub_repo == "me/mine"
    assert read(tmp_path, "seed: 1\n", "--trust_remote_code", "true")[2].trust_remote_code is True
    assert read(tmp_path, "trust_remote_code: false\n")[2].trust_remote_code is False


@pytest.mark.parametrize(
    "kwargs, told",
    [
        *(
            ({name: value}, f"names '{name}', which neither a run's loading takes nor the model's config")
            for name, value in {
                "gguf_file": "x.gguf", "subfolder": "../../etc", "variant": "../../x", "kernel_config": {"a": 1},
                "offload_folder": "X", "ignore_mismatched_sizes": True, "weights_only": False, "config": {},
                "state_dict": {}, "output_loading_info": True, "tp_plan": "auto", "_commit_hash": "x",
            }.items()
        ),
        ({"use_safetensors": False}, "weights are loaded from safetensors alone"),
        ({"device_map": {"": "disk"}}, "device_map puts weights on 'disk', where they cannot be trained"),
        ({"device_map": "/etc/passwd"}, "device_map cannot be taken"),
        ({"quantization_config": {"quant_method": "evil"}}, "quantization_config cannot be taken: Unknown quant"),
        ({"max_memory": {"cpu": "1x"}}, "max_memory cannot be taken"),
        ({"key_mapping": 5}, "key_mapping is 5; it must be a mapping"),
        ({"hidden_size": 100_000}, "sets hidden_size, with which the model would have other weights"),
        ({"vocab_size": 100_000_000}, "sets vocab_size, with which the model would have other weights"),
        ({"attention_bias": True}, "sets attention_bias, with which the model would have other weights"),
        ({"rope_parameters": 5}, "rope_parameters cannot be taken"),
    ],
)  # fmt: skip
def test_settings_of_loading_that_cannot_be_are_refused_by_the_check_of_dry_run_and_trainer(tiny_folder, kwargs, told):
    args = RobustDPOConfig("x", use_cpu=True, report_to="none", model_init_kwargs=kwargs)
    with pytest.raises(ConfigError, match=f"model_init_kwargs.* {told}"):
        settings.check(tiny_folder, args, None)


def test_a_field_of_the_config_that_leaves_the_weights_may_be_set(tiny_folder):
    kwargs = {"attention_dropout": 0.0, "rms_norm_eps": 1e-5, "dtype": "float32", "device_map": {"": "cpu"}}
    args = RobustDPOConfig("x", use_cpu=True, report_to="none", model_init_kwargs=kwargs)
    assert settings.check(tiny_folder, args, None)[0] == tiny_folder


def test_a_folder_with_weights_as_pickles_alone_is_refused(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"evil")
    check_holds_safetensors(str(folder))
    (folder / "model.safetensors").unlink()
    args = RobustDPOConfig("x", use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match="holds its weights as pickles .* only safetensors are loaded.*save_pretrain"):
        settings.check(str(folder), args, None)
    with pytest.raises(ConfigError, match="names the weights pytorch_model.bin, which are no safetensors"):
        check_holds_safetensors(tiny_folder, SimpleNamespace(transformers_weights="pytorch_model.bin"))


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("POSTTRAIN_LOG", "foo", "one of debug, info, warning, error, critical"),
        ("ACCELERATE_LOG_LEVEL", "foo", "one of debug, info, warning, error, critical"),
        ("OMP_NUM_THREADS", "null", "a variable's value is a text or a number"),
        ("OMP_NUM_THREADS", "{a: 1}", "a variable's value is a text or a number"),
        ("WANDB_TAGS", "[a]", "a variable's value is a text or a number"),
        ("OMP_NUM_THREADS", "two", "a whole number above 0"),
        ("OMP_NUM_THREADS", "0", "a whole number above 0"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "true", "a whole number above 0"),
    ],
)
def test_env_takes_values_that_their_readers_take(tmp_path, monkeypatch, name, value, told):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"run.yaml:1: `env` sets {name} to .*{told}"):
        read(tmp_path, f"env: {{{name}: {value}}}\n", kinds=(Toy,))
    assert os.environ[name] == "1"


def test_a_level_of_the_shell_that_is_none_is_named(monkeypatch):
    monkeypatch.setattr(log, "_logger", logging.getLogger("posttrain.of-a-test"))
    monkeypatch.setenv("POSTTRAIN_LOG", "foo")
    for _ in range(2):
        with pytest.raises(ConfigError, match="POSTTRAIN_LOG is 'foo'; it must be one of debug, info"):
            log.get_logger()


@dataclass
class Toy:
    size: int = 1


@pytest.mark.parametrize(
    "name",
    "PATH LD_PRELOAD PYTHONPATH PYTHONSTARTUP HF_ENDPOINT HF_HOME HF_TOKEN GIT_SSH_COMMAND WANDB_BASE_URL "
    "NCCL_NET_PLUGIN POSTTRAIN_CACHE HTTPS_PROXY path MLFLOW_TRACKING_URI".split(),
)
def test_env_sets_no_variable_by_which_programs_or_servers_are_chosen(tmp_path, name):
    before = dict(os.environ)
    with pytest.raises(ConfigError, match=f"run.yaml:2: `env` sets {name}, which a settings file may not"):
        read(tmp_path, f"size: 2\nenv:\n  {name}: x\n", kinds=(Toy,))
    assert dict(os.environ) == before and name not in VARIABLES


@pytest.mark.core("bomb", "merge bomb", "long")
@pytest.mark.parametrize(
    "text",
    [bomb(), merge_bomb(), "x: " + "[" * 3_000, "# " + "x" * (5 << 20), "x: 1" + ":59" * 300],
    ids=["bomb", "merge bomb", "nested", "long", "number"],
)
def test_a_file_that_grows_without_bounds_is_refused_wherever_it_is_read(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML|nested too deeply"):
        parse((Toy,), ["--config", str(path)])
    with pytest.raises(DataError, match="no valid YAML"):
        read_yaml(path)
    if "&a" in text:
        with pytest.raises(DataError, match="aliases stand for has more than"):
            parse_card(f"---\n{text}---\nbody\n", "README.md")


def test_a_file_without_an_end_is_read_no_further_than_settings_are_long():
    with pytest.raises(ConfigError, match="no settings"):
        parse((Toy,), ["--config", "/dev/zero"])


def test_aliases_of_an_ordinary_file_are_read():
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n"
    assert yaml_text.load(text) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


@dataclass
class Named:
    number: int = 1
    name: str | None = None
    names: list[str] = field(default_factory=list)
    nested: dict = field(default_factory=dict)
    generation_kwargs: dict = field(default_factory=dict)


@pytest.mark.parametrize(
    "text",
    [
        'number: "3\\nposttrain: all is well"',
        '"a\\nposttrain: all is well": 1',
        '"name\\e[2J": x',
        'name: "rows.jsonl\\e[2Jposttrain: all is well"',
        'names: [x, "y\\nposttrain: all is well"]',
        'names: x\nnames: "\\nposttrain: all is well"',
        'env: {"A\\nposttrain: all is well": 1}',
        'nested: {"a\\nposttrain: all is well": 1}',
        'nested: {a: "x\\nposttrain: all is well"}',
        'nested: {a: [{"b\\e[2J": 1}]}',
        """nested: '{"a": "x\\nposttrain: all is well"}'""",
        'generation_kwargs: {"a\\nposttrain: all is well": 1}',
    ],
)
def test_no_line_is_forged_by_a_name_or_a_key(tmp_path, capsys, text):
    path = tmp_path / "run.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        parse((Named,), ["--config", str(path)])
    complain(str(caught.value))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "\x1b" not in said, said


def test_the_end_of_an_answer_may_be_a_line_break(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text('generation_kwargs: {stop: ["\\n"]}\nnested: {a: b}\n')
    (named,) = parse((Named,), ["--config", str(path)])
    assert named.generation_kwargs == {"stop": ["\n"]}


@dataclass
class Sharded:
    size: int = 1
    deepspeed: str | None = None


ELSEWHERE = [
    {"csv_monitor": {"enabled": True, "output_path": "/elsewhere"}},
    {"csv_monitor": {"enabled": True}},
    {"monitor_config": {"tensorboard": {"enabled": "true"}}},
    {"wandb": {"enabled": 1}},
    {"autotuning": {"enabled": True}},
    {"flops_profiler": {"enabled": True, "output_file": "notes"}},
    {"zero_optimization": {"offload_param": {"device": "nvme", "nvme_path": "/local"}}},
    {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "swap"}}},
    {"data_efficiency": {"data_sampling": {"metrics": [{"index_to_metric_paths": "x"}]}}},
    {"checkpoint": {"tag": "../../x"}},
]


@pytest.mark.parametrize("settings", ELSEWHERE)
@pytest.mark.parametrize("how", ["mapping", "json", "base64", "file"])
def test_deepspeed_settings_of_a_file_name_nothing_to_write_to(tmp_path, settings, how):
    text = json.dumps({"train_batch_size": "auto", **settings})
    (tmp_path / "ds.json").write_text(text)
    encoded = base64.urlsafe_b64encode(text.encode()).decode()
    given = {"mapping": text, "json": f"'{text}'", "base64": encoded, "file": str(tmp_path / "ds.json")}[how]
    with pytest.raises(ConfigError, match=r"run.yaml:1: `deepspeed` .*--deepspeed FILE"):
        read(tmp_path, f"deepspeed: {given}\n")


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "nvme_path": None}}, "bf16": {}},
        {"csv_monitor": {"enabled": False}, "flops_profiler": {"enabled": True, "output_file": None}},
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "comms_logger": {"enabled": True, "prof_ops": []}},
    ],
)
def test_deepspeed_settings_that_write_nothing_are_taken(settings):
    strangers.check_setting("deepspeed", settings, "run.yaml:1")
    strangers.check_setting("deepspeed", "ds.json", "run.yaml:1")


def test_a_deepspeed_file_of_the_command_line_may_name_paths(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(ELSEWHERE[0]))
    (tmp_path / "run.yaml").write_text("size: 2\n")
    words = ["--config", str(tmp_path / "run.yaml"), "--deepspeed", str(tmp_path / "ds.json")]
    assert parse((Sharded,), words)[0] == Sharded(2, str(tmp_path / "ds.json"))
