"""ALLoRA under ZeRO-2 and, every parameter in parts, under ZeRO-3: one process's update, and every recipe."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.adapters.allora import ALLoRAConfig
from posttrain.models import resolve_model
from tests.distributed.allora import RUN
from tests.families import ADAPTED, METHODS
from tests.runs import distance

ROOT = Path(__file__).parents[2]
NAMES = ("allora/scale_min", "allora/scale_mean", "allora/scale_max", "allora/row_norm_mean")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["cpu_zero2", "cpu_zero3"])
def launch(request, tiny_folder, tmp_path_factory, warm):
    out = tmp_path_factory.mktemp(request.param)
    config, log = str(ROOT / f"configs/accelerate/{request.param}.yaml"), out / "log"
    worker, cache = "tests.distributed.allora:main", {"POSTTRAIN_CACHE": str(out / "cache")}
    child = warm.start("tests.warm:launched", config, worker, tiny_folder, str(out), log=log, **cache)
    assert child.wait() == 0, log.read_text()[-8000:]
    told = json.loads((out / "results.json").read_text())
    return request.param, told, load_file(out / "changes.safetensors"), out


@pytest.fixture(scope="module")
def single(tiny_folder, tmp_path_factory):
    run = RUN | METHODS["allora"].split(8)
    ours, _ = METHODS["allora"].train(tiny_folder, tmp_path_factory.mktemp("allora"), **run)
    plain, _ = METHODS["noisy_sft"].train(tiny_folder, tmp_path_factory.mktemp("lora"), learning_rate=0.2, **run)
    assert distance(plain, ours) > 0.1
    return ours


def part(tensors, name):
    return {key.removeprefix(f"{name}|"): value for key, value in tensors.items() if key.startswith(f"{name}|")}


@pytest.mark.parametrize("name", ["plain", "recomputed"])
def test_two_processes_make_the_update_of_one(name, launch, single):
    change = part(launch[2], name)
    assert change.keys() == single.keys() and distance(change, single) < 1e-4


def test_under_zero3_parameters_are_empty_outside_their_modules(launch):
    backend, told, *_ = launch
    assert set(told) == {"runs", *ADAPTED} and all(told.values())
    for seen in told.values():
        whole, empty = seen[0][1], max(empty for empty, _ in seen)
        # between steps a few may have been fetched ahead
        assert empty == (whole if backend == "cpu_zero3" else 0)


def test_a_resumed_run_is_the_straight_one_bit_for_bit(launch):
    saved, resumed = part(launch[2], "saved-after"), part(launch[2], "resumed-after")
    assert saved.keys() == resumed.keys() and any("lora_B" in key for key in saved)
    assert all(torch.equal(resumed[key], saved[key]) for key in saved)


def test_plain_peft_loads_what_it_has_saved(launch, tiny_folder):
    folder = launch[3] / "saved" / "checkpoint-4"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
    after = part(launch[2], "saved-after")
    matrices = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert matrices.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in matrices.items())
    assert ALLoRAConfig.from_pretrained(folder).eta == 2.0


@pytest.mark.parametrize("recipe", ADAPTED)
def test_every_recipe_trains_with_it(recipe, launch, monkeypatch):
    run = launch[3] / recipe
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    assert len(steps) == 2 and all(name in step for step in steps for name in NAMES)
    assert all(0 < step["allora/scale_min"] <= step["allora/scale_max"] <= 2.0 for step in steps)
    assert steps[-1]["allora/row_norm_mean"] > 0
    monkeypatch.setenv("POSTTRAIN_CACHE", str(launch[3] / "cache"))
    base, tokens = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny")), torch.arange(1, 9)[None]
    expected = base(tokens).logits
    trained = PeftModel.from_pretrained(base, run)(tokens).logits
    assert trained.isfinite().all() and (trained - expected).abs().max() > 1e-6
    assert ALLoRAConfig.from_pretrained(run).eta == 2.0 and "2410.09692" in (run / "README.md").read_text()
