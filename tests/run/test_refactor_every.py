"""`refactor_every` in runs: exact on resume, off by default, told and refused; its callback in TRL's trainers."""

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from posttrain import RobustDPOConfig
from posttrain.adapters.refactoring import RefactorCallback, factors_of
from posttrain.errors import ConfigError
from posttrain.hub.card import _settings
from posttrain.privacy.config import PrivacyConfig
from tests import runs, training
from tests.families import METHODS
from tests.runs import entries, identical, losses, trainable

EVERY = dict(refactor_every=2, max_steps=5, optim="adamw_torch", learning_rate=1e-2, pair_loss="dpo")


def is_orthonormal(model) -> bool:
    return all(
        (one.A.detach() @ one.A.detach().T - torch.eye(len(one.A))).abs().max() < 1e-5 for one in factors_of(model)
    )


def test_a_resumed_run_goes_on_with_the_same_numbers(tiny_folder, tmp_path):
    # between two refactorisations
    saving = dict(save_strategy="steps", save_steps=3)
    _, straight = training.train(tiny_folder, tmp_path, **EVERY | saving)
    checkpoint = str(tmp_path / "checkpoint-3")
    _, resumed = training.train(tiny_folder, tmp_path, resume=checkpoint, **EVERY)
    assert identical(trainable(resumed.model), trainable(straight.model))
    assert losses(resumed) == losses(straight) and len(entries(resumed)) == 5
    with pytest.raises(ConfigError, match="refactor_every: 2 there, 3 here"):
        training.train(tiny_folder, tmp_path, resume=checkpoint, **EVERY | dict(refactor_every=3))


def test_the_run_is_another_one_and_its_a_stays_orthonormal(tiny_folder, tmp_path):
    with_it, trainer = training.train(tiny_folder, tmp_path / "on", **EVERY | dict(max_steps=4))
    assert is_orthonormal(trainer.model)
    _, without = training.train(tiny_folder, tmp_path / "off", **EVERY | dict(max_steps=4, refactor_every=0))
    assert not is_orthonormal(without.model)
    # the step after the first refactorisation is the first that differs
    ours, theirs = losses(trainer), losses(without)
    assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], abs=1e-5) and ours[3] != theirs[3]
    told = dict(_settings(trainer, None))
    assert told["refactor_every"] == "2" and "refactor_every" not in dict(_settings(without, None))
    assert trainer._identity()["refactor_every"] == 2


@pytest.mark.parametrize("off", [0, None])
def test_off_is_off(off, tmp_path, tiny_folder):
    trainer = training.build(tiny_folder, tmp_path, refactor_every=off)
    assert trainer.args.refactor_every == 0
    assert not any(isinstance(one, RefactorCallback) for one in trainer.callback_handler.callbacks)


def test_trls_trainer_takes_the_callback(tiny_folder, tmp_path):
    fields = training.settings(tmp_path, max_steps=2, optim="adamw_torch") | runs.PARENT
    trainer = DPOTrainer(
        tiny_folder, args=DPOConfig(**fields), train_dataset=training.make_pairs(16), peft_config=runs.lora(),
        callbacks=[RefactorCallback(1)],
    )  # fmt: skip
    trainer.train()
    assert is_orthonormal(trainer.model)
    fields |= dict(optim="adagrad", output_dir=str(tmp_path / "other"))
    trainer = DPOTrainer(
        tiny_folder, args=DPOConfig(**fields), train_dataset=training.make_pairs(16), peft_config=runs.lora(),
        callbacks=[RefactorCallback(1)],
    )  # fmt: skip
    with pytest.raises(ConfigError, match="Those that work are sgd, adamw_torch and adamw_torch_fused"):
        trainer.train()


def test_an_optimizer_that_is_given_is_checked_when_the_trainer_is_built(tiny_folder, tmp_path):
    class Given(training.RobustDPOTrainer):
        def __init__(self, *args, **kwargs):
            optimizer = torch.optim.RMSprop([torch.nn.Parameter(torch.zeros(1))])
            super().__init__(*args, optimizers=(optimizer, None), **kwargs)

    with pytest.raises(ConfigError, match="the optimizer is torch.optim.rmsprop.RMSprop"):
        training.build(tiny_folder, tmp_path, trainer_class=Given, refactor_every=2)


@pytest.mark.parametrize(
    ("setting", "variable"), [(dict(), "ACCELERATE_USE_DEEPSPEED"), (dict(), "ACCELERATE_USE_FSDP")]
)
def test_engines_are_refused_by_the_config(setting, variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match="refactor_every under|FSDP was asked for"):
        RobustDPOConfig(str(tmp_path), refactor_every=2)


# GIFT-SW fixes its A, private runs refuse the setting
FAMILIES = [
    name
    for name, method in METHODS.items()
    if name not in ("robust_dpo", "gift_sw") and not issubclass(method.config, PrivacyConfig)
]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_refactors_and_resumes(name, tiny_folder, tmp_path):
    settings, step, _ = METHODS[name].resumed
    settings = settings | dict(refactor_every=1, peft=True)
    _, straight = METHODS[name].train(tiny_folder, tmp_path, **settings)
    assert is_orthonormal(straight.model)
    again = dict(save_strategy="no", resume=str(tmp_path / f"checkpoint-{step}"))
    _, resumed = METHODS[name].train(tiny_folder, tmp_path, **settings | again)
    assert identical(trainable(resumed.model), trainable(straight.model))
