"""What a trainer takes and does as TRL's does: its arguments' places, its output folder, its tags, its pushes."""

import copy
import pickle
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import DPOTrainer, GRPOTrainer, SFTTrainer

from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    HPTConfig,
    HPTTrainer,
    PolicyGradientConfig,
    PolicyGradientTrainer,
    QAEConfig,
    QAETrainer,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.errors import ConfigError
from posttrain.hub import Destination
from posttrain.run import construction, saving
from tests import rollouts, scored, training
from tests.conftest import make_pairs

FAMILIES = [
    (RobustDPOTrainer, RobustDPOConfig, DPOTrainer),
    (PolicyGradientTrainer, PolicyGradientConfig, GRPOTrainer),
    (QAETrainer, QAEConfig, GRPOTrainer),
    (HPTTrainer, HPTConfig, GRPOTrainer),
    (ALoLTrainer, ALoLConfig, SFTTrainer),
]


@pytest.mark.parametrize(("ours", "config", "theirs"), FAMILIES)
def test_the_tags_of_trls_trainer_stay(ours, config, theirs):
    assert set(theirs._tag_names) < set(ours._tag_names)


@pytest.mark.parametrize(
    ("model", "name"), [("org/some-model", "some-model"), ("models/mine", "mine"), ("embedded:tiny", "tiny")]
)
@pytest.mark.parametrize(("ours", "config", "theirs"), FAMILIES)
def test_without_settings_the_output_folder_is_named_as_trl_names_it(ours, config, theirs, model, name):
    assert ours._default_folder(model) == f"{name}-{theirs._name}"


@pytest.mark.slow
def test_a_trainer_without_settings_writes_where_trls_does(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = dict(train_dataset=make_pairs(4), peft_config=training.lora())
    assert RobustDPOTrainer(tiny_folder, **given).args.output_dir == f"{Path(tiny_folder).name}-DPO"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert RobustDPOTrainer(model, **given).args.output_dir == f"{Path(tiny_folder).name}-DPO"
    (tmp_path / f"{Path(tiny_folder).name}-DPO").mkdir(exist_ok=True)
    (tmp_path / f"{Path(tiny_folder).name}-DPO" / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="-DPO, which holds a model"):
        RobustDPOTrainer(tiny_folder, **given)


@pytest.mark.parametrize(("ours", "config", "theirs"), FAMILIES)
def test_copies_of_the_settings_keep_the_hub_token_and_files_do_not(tmp_path, ours, config, theirs):
    module = {DPOTrainer: training, GRPOTrainer: rollouts, SFTTrainer: scored}[theirs]
    token = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
    args = config(**module.settings(tmp_path, hub_token=token, lr_scheduler_kwargs={}))
    deep, shallow = copy.deepcopy(args), copy.copy(args)
    assert deep.hub_token == shallow.hub_token == token and type(deep) is type(args)
    assert deep == args and deep.lr_scheduler_kwargs is not args.lr_scheduler_kwargs
    assert token.encode() not in pickle.dumps(args) and token.encode() not in pickle.dumps(deep)
    assert pickle.loads(pickle.dumps(args)).hub_token is None


BAD = LoraConfig(target_modules=["lm_head"])


@pytest.mark.parametrize(
    "build",
    [
        # in the order of TRL's signatures, up to peft_config
        lambda out: RobustDPOTrainer(
            "./no-such-model", None, RobustDPOConfig(**training.settings(out)), None, make_pairs(4), None, None, None,
            None, (None, None), None, BAD,
        ),
        lambda out: PolicyGradientTrainer(
            "./no-such-model", rollouts.success, PolicyGradientConfig(**rollouts.settings(out)), rollouts.prompts([1]),
            None, None, None, None, (None, None), None, BAD,
        ),
        lambda out: ALoLTrainer(
            "./no-such-model", ALoLConfig(**scored.settings(out)), None, scored.make_scored(4), None, None, None, None,
            None, (None, None), None, None, None, BAD,
        ),
    ],
)  # fmt: skip
def test_an_adapter_given_by_its_place_is_checked(tmp_path, build):
    with pytest.raises(ConfigError, match="lora_target_modules names lm_head"):
        build(tmp_path)


@pytest.mark.slow
def test_an_adapter_given_by_its_place_is_trained(tiny_folder, tmp_path):
    args = RobustDPOConfig(**training.settings(tmp_path, pair_loss="dpo", max_steps=1))
    place = (None, args, None, make_pairs(8), None, None, None, None, (None, None), None)
    by_place = RobustDPOTrainer(tiny_folder, *place, training.lora())
    by_name = RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(8), peft_config=training.lora())
    for trainer in (by_place, by_name):
        trainer.train()
    assert training.losses(by_place) == training.losses(by_name)
    assert by_place._identity()["adapter"] == by_name._identity()["adapter"] == "LORA r 4"
    with pytest.raises(TypeError, match="got peft_config twice, by position and by name"):
        RobustDPOTrainer(tiny_folder, *place, training.lora(), peft_config=training.lora())
    with pytest.raises(TypeError, match="takes 5 arguments behind processing_class"):
        RobustDPOTrainer(tiny_folder, *place, training.lora(), None)


def test_what_a_loss_of_ones_own_would_change_is_refused_by_its_place_too(tmp_path):
    args = ALoLConfig(**scored.settings(tmp_path))
    with pytest.raises(ConfigError, match="compute_loss_func is given, which this trainer does not use"):
        ALoLTrainer("./no-such-model", args, None, scored.make_scored(4), None, None, lambda *a: 0)


@pytest.fixture
def pushes(monkeypatch):
    """A hub that takes everything: what was pushed, in order."""
    done = []
    monkeypatch.setattr(
        construction,
        "preflight",
        lambda args, model, **_: Destination("me/run", "org/base") if args.push_to_hub else None,
    )
    monkeypatch.setattr(saving, "push_run", lambda trainer, message, **kwargs: done.append((message, kwargs)))
    monkeypatch.setattr(saving, "push_checkpoint", lambda trainer, folder: done.append(("checkpoint", folder)))
    return done


@pytest.mark.slow
@pytest.mark.parametrize("family", ["preference", "offline"])
def test_a_model_saved_by_the_user_is_pushed_once_as_trl_pushes_it(tiny_folder, tmp_path, pushes, family):
    given = dict(push_to_hub=True, base_model_id="org/base", hub_model_id="me/run", hub_revision="dev")
    if family == "preference":
        args = RobustDPOConfig(**training.settings(tmp_path, pair_loss="dpo", **given))
        trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(8), peft_config=training.lora())
    else:
        trainer = scored.build(tiny_folder, tmp_path, **given)
    trainer.save_model()
    assert [(message, kwargs["revision"]) for message, kwargs in pushes] == [("Model save", "dev")]
    assert (tmp_path / "README.md").read_text().count("trl") > 0
    trainer.save_model(str(tmp_path / "elsewhere"))
    trainer.save_model(_internal_call=True)
    trainer.push_to_hub(private=True)
    assert [message for message, _ in pushes] == ["Model save", "Model save", "End of training"]
    assert pushes[-1][1]["private"] is True


def test_neither_checkpoints_nor_the_last_finite_weights_are_pushed_as_a_saved_model(tiny_folder, tmp_path, pushes):
    from posttrain.errors import DivergedError

    args = RobustDPOConfig(
        **training.settings(
            tmp_path,
            pair_loss="dpo",
            push_to_hub=True,
            base_model_id="org/base",
            hub_model_id="me/run",
            save_strategy="steps",
            save_steps=1,
        )
    )
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(16), peft_config=training.lora())
    inner = trainer.pair_losses
    trainer.pair_losses = lambda *a: inner(*a) * (float("nan") if trainer.state.global_step else 1.0)
    with pytest.raises(DivergedError):
        trainer.train()
    assert [message for message, _ in pushes] == ["checkpoint"]
    assert (tmp_path / "last-finite-1").is_dir()


def test_a_run_that_is_not_to_be_pushed_is_not(tiny_folder, tmp_path, pushes):
    args = RobustDPOConfig(**training.settings(tmp_path, pair_loss="dpo"))
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(8), peft_config=training.lora())
    trainer.save_model()
    assert pushes == []


@pytest.mark.slow
def test_a_recipe_pushes_once_at_its_end(tiny_folder, tmp_path, pushes):
    from posttrain import recipe
    from posttrain.config import DataArguments

    given = dict(push_to_hub=True, base_model_id="org/base", hub_model_id="me/run", hub_strategy="end", max_steps=1)
    args = RobustDPOConfig(**training.settings(tmp_path, pair_loss="dpo", **given))
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(8), peft_config=training.lora())
    recipe.train(trainer, DataArguments(dataset_name="generated:reverse_list"), evaluate=False)
    assert [message for message, _ in pushes] == ["End of training"]
