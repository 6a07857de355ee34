"""The recipe with noisy embeddings, with the model and the data replaced by tiny ones."""

import json
import runpy
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from posttrain.models import resolve_model
from posttrain.paths import configs_dir, recipes_dir


@pytest.mark.parametrize(
    ("name", "ratio", "paper"),
    [("cpu", "noise/ratio", "2310.05914"), ("gift_sw", "noise/weight_ratio", "2408.15300")],
)
def test_a_config_trains_an_adapter_that_plain_peft_loads(name, ratio, paper, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    given = dict(
        model_name_or_path="embedded:tiny", dataset_name="generated:arithmetic?n=16", output_dir="run", max_steps="2",
        per_device_train_batch_size="2", save_strategy="no", disable_tqdm="true",
    )  # fmt: skip
    if name == "cpu":
        # of embeddings as small as the tiny model's, the file's strength is above their norm
        given["noise_alpha"] = "2"
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    config = str(configs_dir() / "noisy_sft" / f"{name}.yaml")
    monkeypatch.setattr(sys, "argv", ["noisy_sft.py", "--config", config, *flags])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(recipes_dir() / "noisy_sft.py"), run_name="__main__")
    said = capsys.readouterr()
    assert caught.value.code == 0 and "Saved to run" in said.out, said.err
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 and all(row[ratio] > 0 for row in steps)
    tokens = torch.arange(1, 9)[None]
    base = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny"))
    trained = AutoPeftModelForCausalLM.from_pretrained(run)(tokens).logits
    assert trained.isfinite().all() and (trained - base(tokens).logits).abs().max() > 1e-6
    settings = yaml.safe_load((run / "resolved_config.yaml").read_text())
    assert settings["data"]["dataset_name"] == "generated:arithmetic?n=16"
    assert settings["model"]["adapter"] == {"cpu": "lora", "gift_sw": "gift_sw"}[name]
    assert paper in (run / "README.md").read_text()
