"""FSDP2 on two ranks, against one process: one launch, whose cases are `tests.distributed.spread`'s.

The cases that all engines share are `test_sharded`'s.
"""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.models import tiny_model
from tests.distributed import sharding, spread
from tests.runs import distance, fit, identical, trainable


@pytest.fixture(scope="module")
def folders(tiny_folder, tokenizer, tmp_path_factory):
    others = {
        "tied": tiny_model(tie_word_embeddings=True),
        "opt": tiny_model("opt", ffn_dim=128, word_embed_proj_dim=64, dropout=0.0, tie_word_embeddings=False),
    }
    made = {"untied": tiny_folder}
    for name, model in others.items():
        made[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


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


pytestmark = pytest.mark.slow


def part(launch, name: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{name}|"): value for key, value in launch[1].items() if key.startswith(f"{name}|")}


@pytest.mark.parametrize("name", spread.EQUAL)
def test_two_ranks_make_the_update_of_one(launch, folders, tmp_path, monkeypatch, name):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    case = spread.EQUAL[name] | dict(gradient_checkpointing=False)
    reference = fit(spread.build(name, folders, tmp_path, **case), trainable)[0]
    ours = part(launch, name)
    assert ours.keys() == reference.keys()
    assert distance(ours, reference) <= 1e-4


@pytest.mark.parametrize("name", spread.RESUMED)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(launch, name):
    straight, resumed = part(launch, f"{name}-straight"), part(launch, f"{name}-resumed")
    assert straight.keys() == resumed.keys()
    assert identical(resumed, straight)


def test_log_probabilities_of_bf16_are_not_rounded_to_it(launch, folders, tmp_path):
    told, tensors, _ = launch
    assert told["dtypes"] == {"policy": "torch.float32", "reference": "torch.float32"}
    trainer = spread.build("bf16", folders, tmp_path, **spread.BF16 | dict(bf16=False))
    exact = spread.log_probs(trainer, trainer.model)
    scored = exact != 0
    rounding = (exact.bfloat16() - exact)[scored].abs().mean()
    for model in ("policy", "reference"):
        gap = (tensors[f"bf16|{model}"] - exact)[scored].abs().mean()
        assert gap < rounding / 2, "what the forward's own bf16 makes of them is less than what rounding them does"


def test_an_adapter_without_gradient_is_found_and_others_are_not(launch):
    # every other case trains all of its adapter's tensors, and none of them was stopped
    assert "2 of 28 adapter tensors got no gradient" in launch[0]["dead"]
    assert "layers.0.self_attn.q_proj.lora_A" in launch[0]["dead"]


def test_a_run_that_diverges_ends_on_all_ranks_with_finite_weights(launch):
    told, _, out = launch
    assert "the loss became NaN or infinite at step 2" in told["diverged"]
    weights = load_file(out / "diverged" / "last-finite-1" / "adapter_model.safetensors")
    assert weights and all(value.isfinite().all() for value in weights.values())


def test_an_evaluation_before_training_is_refused(launch):
    assert "an evaluation came before training under FSDP" in launch[0]["early"]


def test_an_adapter_that_began_in_the_base_is_saved_for_the_base(launch, folders):
    """PiSSA, whose base FSDP spreads without what the adapter took."""
    base = AutoModelForCausalLM.from_pretrained(folders["untied"])
    saved = PeftModel.from_pretrained(base, launch[2] / "pissa" / "saved").eval()
    ids = torch.arange(10, 42).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(saved(input_ids=ids).logits, launch[1]["pissa-logits"], atol=1e-4, rtol=1e-4)
