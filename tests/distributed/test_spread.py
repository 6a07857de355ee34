"""FSDP2 on two ranks, against one process: one launch, whose cases are `tests.distributed.spread`'s.

The cases that all engines share are `test_sharded`'s.
"""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain import RobustDPOConfig
from posttrain.errors import ConfigError
from posttrain.models import tiny_model
from posttrain.run import config
from tests import rollouts
from tests.distributed import sharding, spread
from tests.families import METHODS
from tests.runs import distance, fit, trainable


@pytest.fixture(scope="module")
def folders(tiny_folder, tokenizer, tmp_path_factory):
    tied = tmp_path_factory.mktemp("tied")
    tiny_model(tie_word_embeddings=True).save_pretrained(tied)
    tokenizer.save_pretrained(tied)
    return {"untied": tiny_folder, "tied": str(tied)}


@pytest.fixture(scope="module")
def launch(folders, tmp_path_factory, warm):
    """What was said, and the tensors of each case."""
    out = tmp_path_factory.mktemp("spread")
    log, cache = out / "log", str(out / "cache")
    main = "tests.distributed.spread:main"
    arguments = [str(sharding.launch_file(out)), main, json.dumps(folders), str(out)]
    child = warm.start("tests.warm:launched", *arguments, log=log, POSTTRAIN_CACHE=cache)
    assert child.wait() == 0, log.read_text()[-8000:]
    return json.loads((out / "told.json").read_text()), load_file(out / "tensors.safetensors"), out


def part(launch, name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}|"): value for key, value in launch[1].items() if key.startswith(f"{name}|")}


@pytest.mark.slow
@pytest.mark.parametrize("name", spread.EQUAL)
def test_two_ranks_make_the_update_of_one(launch, folders, tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    case = {key: value for key, value in spread.EQUAL[name].items() if key != "before"}
    reference = fit(spread.build(name, folders, tmp_path, **case | dict(gradient_checkpointing=False)), trainable)[0]
    ours = part(launch, name)
    assert ours.keys() == reference.keys()
    assert distance(ours, reference) <= 1e-4
