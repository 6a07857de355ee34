"""Models are loaded on the one device of each process, by name; several devices of one process are refused."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from posttrain.errors import ConfigError
from posttrain.run import devices
from tests import training
from tests.families import METHODS

REFUSAL = (
    r"one process sees 4 GPUs, and trains on one. Set CUDA_VISIBLE_DEVICES=0 .* --launch ddp --num_processes 4`, or "
    r"`accelerate launch --num_processes 4`"
)


@pytest.mark.parametrize("name", METHODS)
def test_one_process_with_several_devices_is_refused_before_anything_loads(name, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 4))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: pytest.fail())
    for make in (METHODS[name].build, METHODS[name].describe):
        with pytest.raises(ConfigError, match=REFUSAL):
            make(tiny_folder, tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "model", "taken"),
    [
        (None, "folder", False),
        ({"device_map": {"": 0}}, "folder", False),
        ({"device_map": "auto"}, "folder", True),
        ({"device_map": {"model": 0, "lm_head": 1}}, "folder", True),
        ({"device_map": "auto"}, SimpleNamespace(), False),
        (None, SimpleNamespace(hf_device_map={"model": 0, "lm_head": 1}), True),
        (None, SimpleNamespace(hf_device_map={"": 0}), False),
    ],
)
def test_a_model_that_its_user_spreads_is_taken(kwargs, model, taken):
    args = SimpleNamespace(n_gpu=4, model_init_kwargs=kwargs)
    if taken:
        devices.check_one_device(args, model)
        return
    with pytest.raises(ConfigError, match=REFUSAL):
        devices.check_one_device(args, model)
    args.n_gpu = 1
    devices.check_one_device(args, model)


@pytest.mark.parametrize(
    ("device", "ranks", "given", "named"),
    [
        ("cuda:0", 1, None, {"device_map": {"": "cuda:0"}}),
        ("cuda:1", 1, {"dtype": "auto"}, {"dtype": "auto", "device_map": {"": "cuda:1"}}),
        # of several, each places its own
        ("cuda:1", 8, None, {"device_map": None}),
        ("cuda:0", 1, {"device_map": "auto"}, {"device_map": "auto"}),
        ("cpu", 1, None, None),
        ("cpu", 2, {"dtype": "auto"}, {"dtype": "auto"}),
        ("mps", 1, None, None),
    ],
)
def test_the_device_is_named_where_nobody_named_one(device, ranks, given, named):
    args = SimpleNamespace(device=torch.device(device), world_size=ranks, model_init_kwargs=given)
    devices.name_device(args)
    assert args.model_init_kwargs == named


LOADING = {
    "robust_dpo": ("trl.trainer.dpo_trainer", dict(peft=False), 2),
    "a_lol": ("trl.trainer.sft_trainer", dict(), 1),
    "policy_gradient": ("trl.trainer.grpo_trainer", dict(peft=False, beta=0.1), 2),
    "noisy_sft": ("trl.trainer.sft_trainer", dict(), 1),
}


@pytest.mark.parametrize("name", LOADING)
def test_the_libraries_choose_no_device_for_policy_or_reference(name, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "name_device", _on_cpu)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    module, settings, models = LOADING[name]
    placed = _noted(monkeypatch, module)
    trainer = METHODS[name].build(tiny_folder, tmp_path, **settings)
    assert placed == [{"": "cpu"}] * models
    assert trainer.args.model_init_kwargs is None


def test_the_reference_of_a_given_model_is_placed_without_a_word(tiny_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(devices, "name_device", _on_cpu)
    placed = _noted(monkeypatch, "trl.trainer.dpo_trainer")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    trainer = training.build(model, tmp_path, peft=False)
    assert placed == [{"": "cpu"}] and trainer.args.model_init_kwargs is None
    assert "model_init_kwargs" not in caplog.text


def _on_cpu(args) -> None:
    args.model_init_kwargs = (args.model_init_kwargs or {}) | {"device_map": {"": "cpu"}}


def _noted(monkeypatch, module: str) -> list:
    """Where TRL loads models, as it does."""
    from trl.trainer.utils import create_model_from_path

    placed = []

    def load(*args, **kwargs):
        placed.append(kwargs.get("device_map", "none named"))
        return create_model_from_path(*args, **kwargs)

    monkeypatch.setattr(f"{module}.create_model_from_path", load)
    return placed
