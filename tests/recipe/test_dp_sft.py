"""The recipe of private fine-tuning, with the model and the data replaced by tiny ones."""

import json
import runpy
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from posttrain.models import resolve_model
from posttrain.paths import configs_dir, recipes_dir
from tests.recipe.in_process import lines, words

pytest.importorskip("dp_accounting")
ROWS = [{"prompt": f"Is {i} even?", "completion": " yes" if i % 2 else " no", "user": f"u{i % 20}"} for i in range(40)]


@pytest.fixture
def recipe(tmp_path, monkeypatch, capsys):
    """Runs the recipe with its settings for a CPU: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))

    def run(**given):
        settings = dict(
            model_name_or_path="embedded:tiny", dataset_name="rows.jsonl", output_dir="run", max_steps=2,
            save_strategy="no", disable_tqdm="true", # no draw is above the data, whose accounting is quicker
            expected_batch_size=16, target_delta=1e-3,
        )  # fmt: skip
        config = str(configs_dir() / "dp_sft" / "cpu.yaml")
        monkeypatch.setattr(sys, "argv", ["dp_sft.py", "--config", config, *words(settings | given)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(recipes_dir() / "dp_sft.py"), run_name="__main__")
        said = capsys.readouterr()
        return caught.value.code, said.out, said.err

    return run


def test_the_config_trains_an_adapter_with_a_promise_that_plain_peft_loads(recipe, tmp_path):
    code, out, err = recipe(privacy_unit_column="user", rows_per_unit=2, expected_batch_size=8)
    assert code == 0 and "Saved to run" in out, err
    run = tmp_path / "run"
    steps = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert [0 < row["privacy/epsilon"] <= 8 for row in steps] == [True, True]
    promise = json.loads((run / "posttrain_privacy.json").read_text())
    assert (promise["column"], promise["units"], promise["steps"]) == ("user", 20, 2)
    card = (run / "README.md").read_text()
    assert "differentially private" in card and "1607.00133" in card and "curves.png" not in card
    tokens, base = torch.arange(1, 9)[None], AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))
    trained = AutoPeftModelForCausalLM.from_pretrained(run)(tokens).logits
    assert trained.isfinite().all() and (trained - base(tokens).logits).abs().max() > 1e-6


@pytest.mark.slow
def test_a_dry_run_tells_units_noise_and_steps(recipe, tmp_path):
    code, out, err = recipe(dry_run="true")
    assert code == 0 and not (tmp_path / "run").exists(), err
    told = dict(line.rsplit(maxsplit=1) for line in out.splitlines() if line and not line.startswith(" "))
    assert told["units of privacy"] == "40" and told["most units of a step"] == "40" and told["steps"] == "2"
    assert float(told["noise_multiplier"]) > 0 and float(told["epsilon"]) == pytest.approx(8, rel=1e-3)


def test_a_run_without_an_epsilon_is_answered(recipe):
    code, _, err = recipe(target_epsilon="null")
    assert code == 2 and "target_epsilon and noise_multiplier are both null" in err
