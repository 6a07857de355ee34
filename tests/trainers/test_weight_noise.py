"""Noise on weights in a run: the forward that is backpropagated has it, however it is recomputed, and no other has."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

from posttrain import (
    ALoLConfig,
    ALoLTrainer,
    NoisySFTConfig,
    NoisySFTTrainer,
    QAETrainer,
    RobustDPOConfig,
    RobustDPOTrainer,
)
from posttrain.adapters.gift_sw import GiftSWConfig, layers_of
from posttrain.errors import ConfigError
from posttrain.mechanisms.noise.weights import WeightNoise
from posttrain.run import adapter_schemes
from posttrain.run.identity import identity
from tests import rollouts, scored, training
from tests.conftest import make_pairs
from tests.runs import distance, entries, fit

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func':UserWarning")
CHECKPOINTED = {name: dict(gradient_checkpointing=True, gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
                for name, reentrant in (("reentrant", True), ("not reentrant", False))}  # fmt: skip


def adapter(**settings) -> GiftSWConfig:
    return GiftSWConfig(
        **dict(r=8, target_modules="all-linear", bits=3, noise="gaussian", calibration_rows=4) | settings
    )


def on_pairs(folder, output_dir, noise="gaussian", **settings):
    args = RobustDPOConfig(**training.settings(output_dir, **settings))
    pairs = make_pairs(16)
    return RobustDPOTrainer(folder, args=args, train_dataset=pairs, peft_config=adapter(noise=noise))


def on_answers(folder, output_dir, noise="gaussian", **settings):
    fields = dict(variant="a_lol", value="column", value_column="baseline", learning_rate=0.05) | settings
    rows = scored.make_scored(16, baseline=[-0.1] * 16)
    args = ALoLConfig(**scored.settings(output_dir, **fields))
    return ALoLTrainer(folder, args=args, train_dataset=rows, eval_dataset=rows, peft_config=adapter(noise=noise))


def on_rollouts(folder, output_dir, noise="gaussian", **settings):
    args = rollouts.PRESETS["qae"][1](**rollouts.settings(output_dir, **dict(beta=0.1) | settings))
    return QAETrainer(
        folder, rollouts.success, args, rollouts.prompts([1, 0, 4, 2]), peft_config=adapter(noise=noise),
        rollout_func=rollouts.rollouts,
    )  # fmt: skip


def on_instructions(folder, output_dir, noise="auto", **settings):
    fields = scored.settings(output_dir, **dict(learning_rate=0.5) | settings)
    del fields["prefix_sharing"]
    rows = scored.make_scored(16).remove_columns("reward")
    return NoisySFTTrainer(
        folder, args=NoisySFTConfig(**fields), train_dataset=rows, eval_dataset=rows, peft_config=adapter(noise=noise)
    )


FAMILIES = {"pairs": on_pairs, "answers": on_answers, "rollouts": on_rollouts, "instructions": on_instructions}


@pytest.fixture(scope="module")
def plain(tiny_folder, tmp_path_factory):
    """The change of a preference run with noise, which is not that of one without, and its trainer."""
    noisy, trainer = fit(on_pairs(tiny_folder, tmp_path_factory.mktemp("noisy")))
    clean, _ = fit(on_pairs(tiny_folder, tmp_path_factory.mktemp("clean"), noise="none"))
    assert distance(clean, noisy) > 0.1
    return noisy, trainer


@pytest.mark.core("not reentrant")
@pytest.mark.parametrize("how", CHECKPOINTED)
def test_a_reference_between_forward_and_recomputation_changes_nothing(how, plain, tiny_folder, tmp_path):
    change, _ = fit(on_pairs(tiny_folder, tmp_path, **CHECKPOINTED[how]))
    assert distance(change, plain[0]) < 1e-5


@pytest.mark.parametrize("how", CHECKPOINTED)
def test_a_gate_that_is_frozen_until_the_next_forward_is_told_apart(how, plain, tiny_folder, tmp_path, monkeypatch):
    frozen = property(lambda self: self._under_way and self._entered)
    monkeypatch.setattr(WeightNoise, "is_on", frozen)
    trainer = on_pairs(tiny_folder, tmp_path, **CHECKPOINTED[how])
    if how == "not reentrant":
        with pytest.raises(CheckpointError):
            trainer.train()
    else:
        # recomputed without its noise, without a word
        change, _ = fit(trainer)
        assert distance(change, plain[0]) > 0.1


class Watched:
    """Notes of each forward of the model whether weights had noise, and whether there was a gradient."""

    def __init__(self, trainer):
        self.forwards = []
        inner = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
        inner.register_forward_pre_hook(self.begin)
        inner.register_forward_hook(self.end)
        self.noise = layers_of(trainer.model)[0][1].weight_noise

    def begin(self, *_):
        self.noise.take_ratio()

    def end(self, *_):
        self.forwards.append((self.noise.take_ratio() > 0, torch.is_grad_enabled()))


MORE = {"pairs": dict(reduction="dr_dpo"), "rollouts": dict(num_iterations=2)}


@pytest.mark.core("pairs")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backpropagated_forward_has_it_and_no_other(family, tiny_folder, tmp_path, monkeypatch):
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2) if family != "rollouts" else {}
    trainer = FAMILIES[family](tiny_folder, tmp_path, noise="gaussian", **MORE.get(family, {}), **split)
    watched = Watched(trainer)
    # what the hooks take is not there to be logged
    monkeypatch.setattr(trainer._scheme, "after_step", lambda: None)
    trainer.train()
    before = len(watched.forwards)
    if family != "rollouts":
        trainer.evaluate(trainer.eval_dataset or make_pairs(4))
    steps = 2 * trainer.args.gradient_accumulation_steps
    noisy = [has_gradient for has_noise, has_gradient in watched.forwards if has_noise]
    assert len(noisy) == steps and all(noisy)
    # references, the scoring of a window, the check of the first step, evaluation
    others = [has_gradient for has_noise, has_gradient in watched.forwards if not has_noise]
    assert others and not any(others) and (len(watched.forwards) > before or family == "rollouts")


@pytest.mark.core("pairs", "instructions")
@pytest.mark.parametrize("family", FAMILIES)
def test_by_default_instructions_alone_have_it(family, tiny_folder, tmp_path):
    trainer = FAMILIES[family](tiny_folder, tmp_path, noise="auto")
    assert trainer.weight_noise_kind == ("gaussian" if family == "instructions" else "none")
    assert trainer.weights_have_noise == (family == "instructions")


def test_its_ratio_is_logged_and_the_reference_is_checked_without_it(plain):
    # `check_reference` is on: the noisy policy alone would be another model than the reference
    _, trainer = plain
    rows = entries(trainer)
    assert trainer._margin_checked and all(0.2 < row["noise/weight_ratio"] < 0.4 for row in rows)


@pytest.mark.parametrize("factor", [0.0, 10.0])
def test_a_run_without_its_noise_or_with_too_much_stops(factor, tiny_folder, tmp_path):
    trainer = on_instructions(tiny_folder, tmp_path)
    for _, _, variant, _ in layers_of(trainer.model):
        variant.rows.step = variant.rows.step * factor
    said = "there is none" if factor == 0 else "it has .* times the norm of the weights"
    with pytest.raises(ConfigError, match=f"of the noise of .*q_proj {said}.*Give more bits"):
        trainer.train()


def test_hidden_noise_has_a_clean_pass_and_weights_none(tiny_folder, tmp_path):
    hidden = dict(hidden_noise="noisefit", noise_layers=[0])
    with pytest.raises(ConfigError, match="hidden_noise is noisefit with adapter gift_sw, whose noise is gaussian"):
        on_instructions(tiny_folder, tmp_path, **hidden)
    on_instructions(tiny_folder, tmp_path, noise="none", **hidden)


def test_weights_in_parts_of_fsdp_are_refused(tmp_path, monkeypatch):
    args = NoisySFTConfig(str(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="adapter gift_sw under FSDP, which leaves a layer a part of its weight"):
        adapter_schemes.check(adapter(noise="none"), args)
    adapter_schemes.check(training.lora(), args)


def test_a_run_whose_layers_are_not_reached_stops(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(WeightNoise, "is_on", property(lambda self: False))
    with pytest.raises(ConfigError, match="no layer has had noise in the first step"):
        on_instructions(tiny_folder, tmp_path).train()


def test_a_resumed_run_takes_over_the_columns_of_its_checkpoint(tiny_folder, tmp_path, monkeypatch):
    run = dict(max_steps=2, save_strategy="steps", save_steps=1)
    first = on_instructions(tiny_folder, tmp_path, **run)
    first.train()
    # of a base that was rounded differently, or other kernels
    from posttrain.objectives import salience

    monkeypatch.setattr(salience, "largest", lambda scores, count: torch.arange(count))
    again = on_instructions(tiny_folder, tmp_path, **run | dict(save_strategy="no"))
    columns = [variant.columns.tolist() for _, _, variant, _ in layers_of(first.model)]
    assert [variant.columns.tolist() for _, _, variant, _ in layers_of(again.model)] != columns
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [variant.columns.tolist() for _, _, variant, _ in layers_of(again.model)] == columns
    ours, theirs = (training.trainable(trainer.model) for trainer in (again, first))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_trained_adapter_that_is_given_keeps_columns_and_reference(tiny_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    on_instructions(tiny_folder, tmp_path / "a").train()
    first = on_instructions(tiny_folder, tmp_path / "b")
    first.train()
    first.save_model(str(tmp_path / "saved"))
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    config = GiftSWConfig.from_pretrained(tmp_path / "saved")
    config.noise = "gaussian"
    model = PeftModel.from_pretrained(base, tmp_path / "saved", config=config, is_trainable=True)
    args = RobustDPOConfig(**training.settings(tmp_path / "dpo"))
    trainer = RobustDPOTrainer(model, args=args, train_dataset=make_pairs(16), processing_class=first.processing_class)
    # the reference's copy of the adapter has its columns too, and the first step is checked against it
    trainer.train()
    assert {name for *_, name in layers_of(trainer.model)} == {"default", "ref"} and trainer._margin_checked
    own = [variant.columns.tolist() for _, _, variant, _ in layers_of(trainer.model, "default")]
    assert own == [variant.columns.tolist() for _, _, variant, _ in layers_of(first.model)]


def test_the_scheme_is_of_a_runs_identity_and_its_card(tiny_folder, tmp_path):
    trainer = on_instructions(tiny_folder, tmp_path)
    assert identity(trainer)["adapter_scheme"] == "gift_sw 3 bits, auto noise, sensitivity 2 inf 1 of 4 rows"
    assert identity(on_pairs(tiny_folder, tmp_path / "b"))["adapter_scheme"].startswith("gift_sw 3 bits, gaussian")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    for told in ("2408.15300", "salient columns of each layer", "gaussian, by the step of 3 bits", "50%"):
        assert told in card


def test_a_plain_adapter_leaves_no_side_file_of_an_earlier_run(tiny_folder, tmp_path):
    on_instructions(tiny_folder, tmp_path).save_model()
    assert (tmp_path / "posttrain_adapter.json").is_file()
    rows = scored.make_scored(16).remove_columns("reward")
    fields = scored.settings(tmp_path, overwrite=True)
    del fields["prefix_sharing"]
    args = NoisySFTConfig(**fields)
    NoisySFTTrainer(tiny_folder, args=args, train_dataset=rows, peft_config=training.lora()).save_model()
    assert not (tmp_path / "posttrain_adapter.json").exists()
