"""A GIFT-SW adapter under ZeRO-3, every parameter in parts, against one process; and going on from a checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.adapters.gift_sw import layers_of
from tests.distributed.salient import RUN
from tests.families import METHODS
from tests.runs import distance

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tiny_folder, tmp_path_factory, warm):
    out = tmp_path_factory.mktemp("salient")
    config = str(ROOT / "configs/accelerate/cpu_zero3.yaml")
    log = out / "log"
    child = warm.start("tests.warm:launched", config, "tests.distributed.salient:main", tiny_folder, str(out), log=log)
    assert child.wait() == 0, log.read_text()[-8000:]
    return json.loads((out / "results.json").read_text()), load_file(out / "changes.safetensors"), out


@pytest.fixture(scope="module")
def single(tiny_folder, tmp_path_factory):
    run = RUN | METHODS["gift_sw"].split(8)
    noisy = METHODS["gift_sw"].train(tiny_folder, tmp_path_factory.mktemp("noisy"), **run)
    clean, _ = METHODS["gift_sw"].train(tiny_folder, tmp_path_factory.mktemp("clean"), noise="none", **run)
    assert distance(clean, noisy[0]) > 0.1
    return noisy


def part(tensors, name):
    return {key.removeprefix(f"{name}|"): value for key, value in tensors.items() if key.startswith(f"{name}|")}


@pytest.mark.parametrize("name", ["plain", "recomputed"])
def test_ranks_that_hold_parts_make_the_update_of_one_process(name, ranks, single):
    told, tensors, _ = ranks
    change, trainer = single
    parameters = told["in_parts"][0][1]
    # between steps a few may have been fetched ahead
    assert max(empty for empty, _ in told["in_parts"]) == parameters
    ours = part(tensors, name)
    after = {key: ours[key] for key in change}
    start = {key: value for key, value in trainer.model.named_parameters() if key in change}
    # B begins at zero, so what it is at the end is its change
    assert distance(after, {key: value.detach() for key, value in start.items()}) < 1e-4
    assert told["columns"][name] == [variant.columns.tolist() for _, _, variant, _ in layers_of(trainer.model)]


def test_plain_peft_loads_what_ranks_with_parts_have_saved(ranks, tiny_folder):
    folder, tensors = ranks[2] / "saved" / "checkpoint-2", part(ranks[1], "saved")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_folder), folder)
    matrices = {name: value for name, value in model.named_parameters() if "lora_A" in name}
    assert matrices and all(torch.equal(value, tensors[name]) for name, value in matrices.items())


def test_a_resumed_run_has_the_columns_the_matrices_and_the_noise_of_its_checkpoint(ranks):
    told, tensors, _ = ranks
    saved, resumed = part(tensors, "saved"), part(tensors, "resumed")
    assert told["columns"]["resumed"] == told["columns"]["saved"] != [list(range(8))] * len(told["columns"]["saved"])
    assert saved.keys() == resumed.keys() and any("lora_A" in key for key in saved)
    assert all(torch.equal(resumed[key], saved[key]) for key in saved)
