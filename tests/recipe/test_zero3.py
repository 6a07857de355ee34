"""Every recipe's ZeRO-3 config on two processes, with the model and the data replaced by tiny ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from posttrain.models import resolve_model
from posttrain.paths import configs_dir, recipes_dir
from tests.families import METHODS
from tests.recipe.in_process import RECIPES, words

BIN = Path(sys.executable).parent
# a step of an optimiser that bf16 does not round away
LEARNING_RATE = ["--learning_rate", "1e-2", "--warmup_steps", "0"]
SETTINGS = {recipe: given for method in METHODS.values() for recipe, given in method.recipes.items()}
# a method that no ZeRO can train has no such config
SHARDED = [recipe for m in METHODS.values() if not set(m.cases) <= set(m.unsharded) for recipe in m.recipes]


@pytest.mark.slow
def test_salient_columns_train_sharded_and_are_saved_as_a_plain_adapter(tmp_path):
    command = [
        BIN / "accelerate", "launch", "--config_file", configs_dir() / "accelerate" / "cpu_zero3.yaml",
        recipes_dir() / "noisy_sft.py", "--config", configs_dir() / "noisy_sft" / "gift_sw.yaml",
        "--model_name_or_path", "embedded:tiny", "--output_dir", "run", "--max_steps", "2", "--save_steps", "2",
        "--dataset_name", "generated:arithmetic?n=16", "--gradient_accumulation_steps", "1", "--lora_r", "8",
    ]  # fmt: skip
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(recipes_dir().parent)}
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(step.get("noise/weight_ratio", 0) > 0 for step in steps) == 2
    tokens, base = torch.arange(1, 9)[None], AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))
    trained = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")(tokens).logits
    assert trained.isfinite().all() and (trained - base(tokens).logits).abs().max() > 1e-6


def test_every_recipe_has_settings_and_a_config_of_zero3():
    assert {path.parent.name for path in configs_dir().glob("*/zero3.yaml")} == {*SHARDED, "accelerate"}
    # clients take turns in one process
    assert SETTINGS.keys() == set(RECIPES) - {"fedsvd"}


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARDED)
def test_the_zero3_config_trains_sharded_and_saves_a_whole_model(tmp_path, method):
    command = [
        BIN / "accelerate", "launch", "--config_file", configs_dir() / "accelerate" / "cpu_zero3.yaml",
        recipes_dir() / f"{method}.py", "--config", configs_dir() / method / "zero3.yaml", "--model_name_or_path",
        "embedded:tiny", "--output_dir", "run", "--max_steps", "2", "--save_steps", "2",
        # kernels of cards are not to be had here
        "--logging_steps", "1", "--attn_implementation", "sdpa", *LEARNING_RATE, *words(SETTINGS[method]),
    ]  # fmt: skip
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(recipes_dir().parent)}
    environment["POSTTRAIN_LOG"] = "info"
    done = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in step for step in steps) == 2
    model = AutoModelForCausalLM.from_pretrained(run)
    assert model(torch.arange(1, 9)[None]).logits.isfinite().all()
    base = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny")).state_dict()
    # what is saved is rounded to its dtype, and that alone is no training
    assert all(not torch.equal(value, base[name].to(value.dtype)) for name, value in model.state_dict().items())
    assert yaml.safe_load((run / "resolved_config.yaml").read_text())["processes"] == 2
    # DeepSpeed writes these, a rank each, where the weights are partitioned
    states = [path.name for path in (run / "checkpoint-2").rglob("*_model_states.pt")]
    assert sorted(states) == [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)]
