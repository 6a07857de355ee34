"""Every recipe's line with `--adapter allora`, on one process, with the model and the data replaced by tiny ones."""

import json
import runpy
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from posttrain.adapters.allora import ALLoRAConfig
from posttrain.models import resolve_model
from posttrain.paths import configs_dir, recipes_dir
from tests.families import ADAPTED, METHODS
from tests.recipe.in_process import words

SETTINGS = {recipe: given for method in METHODS.values() for recipe, given in method.recipes.items()}
RUN = dict(
    adapter="allora", model_name_or_path="embedded:tiny", output_dir="run", max_steps=2, logging_steps=1,
    disable_tqdm="true", save_strategy="no", learning_rate=1e-2, warmup_steps=0,
)  # fmt: skip


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """Runs a recipe with its file of settings for a CPU: what it says on stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(name, **given):
        config = str(configs_dir() / name / "cpu.yaml")
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--config", config, *words(SETTINGS[name] | RUN | given)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(recipes_dir() / f"{name}.py"), run_name="__main__")
        said = capsys.readouterr()
        assert caught.value.code == 0, said.err
        return said.out, said.err

    return run


@pytest.mark.core("a_lol-gradient")
@pytest.mark.parametrize("form", ["gradient", "update"])
@pytest.mark.parametrize("name", ADAPTED)
def test_a_recipe_trains_with_it_and_plain_peft_loads_what_it_saves(name, form, recipe, tmp_path):
    out, _ = recipe(name, allora_form=form)
    assert "Saved to run" in out
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 and all(0 < row["allora/scale_min"] <= row["allora/scale_max"] <= 2.0 for row in steps)
    assert steps[-1]["allora/row_norm_mean"] > 0
    tokens, base = torch.arange(1, 9)[None], AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))
    trained = AutoPeftModelForCausalLM.from_pretrained(run)(tokens).logits
    assert trained.isfinite().all() and (trained - base(tokens).logits).abs().max() > 1e-6
    saved = ALLoRAConfig.from_pretrained(run)
    assert (saved.eta, saved.form, saved.lora_alpha, saved.lora_dropout) == (2.0, form, saved.r, 0.0)
    settings = yaml.safe_load((run / "resolved_config.yaml").read_text())["model"]
    assert (settings["adapter"], settings["allora_eta"], settings["allora_form"]) == ("allora", 2.0, form)
    assert (settings["lora_alpha"], settings["lora_dropout"]) == (settings["lora_r"], 0.0)
    assert "2410.09692" in (run / "README.md").read_text()


def test_a_dry_run_tells_the_scheme(recipe, tmp_path, logged):
    with logged.at_level("INFO", logger="posttrain"):
        out, _ = recipe("a_lol", dry_run="true")
    assert "allora eta 2.0, gradient form" in out and not (tmp_path / "run").exists()
    # what the file has for a LoRA
    assert "`lora_alpha: 32` is left out, as the command line has --adapter allora" in logged.text
    assert "`lora_dropout: 0.05` is left out, as the command line has --adapter allora" in logged.text
